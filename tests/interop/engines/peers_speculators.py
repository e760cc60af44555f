"""Other trainers' own modules: `peers_speculators.py JOBS.json RESULTS.json`, run by their environment.

A job either makes a drafter with random weights and saves it as its trainer does ("network" given), or loads
the folder that it names. In both cases it runs the module on the tensors of "inputs" and writes its logits to
"outputs": of EAGLE-3 [steps, rows, draft vocabulary] of the training-time test, of DFlash [anchors, block,
vocabulary]. "library" is speculators or dflash, z-lab's own package.
"""

import torch
from jobs import run_jobs
from safetensors.torch import load_file, save_file
from speculators import SpeculatorModel, SpeculatorModelConfig
from speculators.config import SpeculatorsConfig, VerifierConfig
from speculators.models.dflash import DFlashDraftModel, DFlashSpeculatorConfig
from speculators.models.dspark import DSparkDraftModel, DSparkSpeculatorConfig
from speculators.models.dspark import core as dspark
from speculators.models.eagle3 import Eagle3DraftModel, Eagle3SpeculatorConfig
from speculators.proposals.greedy import GreedyTokenProposalConfig
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3Config

KINDS = {
    "eagle3": (Eagle3SpeculatorConfig, Eagle3DraftModel),
    "dflash": (DFlashSpeculatorConfig, DFlashDraftModel),
    "dspark": (DSparkSpeculatorConfig, DSparkDraftModel),
}


def randomise(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        shared = ("embed_tokens", "verifier") if isinstance(model, Eagle3DraftModel) else (
            "embed_tokens", "verifier", "lm_head",
        )  # fmt: skip
        if name.startswith(shared):
            continue  # the target's own
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = 0.2 * noise if parameter.ndim > 1 else 1 + 0.2 * noise


def make_speculators(job, inputs):
    config_class, model_class = KINDS[job["kind"]]
    network = dict(job["network"])
    layer = AutoConfig.for_model(network.pop("model_type"), **network)
    layer._attn_implementation = "eager"
    section = SpeculatorsConfig(
        algorithm=job["kind"],
        proposal_methods=[GreedyTokenProposalConfig(speculative_tokens=3)],
        default_proposal_method="greedy",
        verifier=VerifierConfig.from_pretrained(job["target"]),
    )
    model = model_class(
        config_class(transformer_layer_config=layer, speculators_config=section, **job["own"])
    )
    if "t2d" in inputs:
        model.load_vocab_mappings(inputs["t2d"], inputs["d2t"])
    model.load_verifier_weights()
    randomise(model, job["seed"])
    model.save_pretrained(job["folder"])
    return model


def load_speculators(job):
    config = SpeculatorModelConfig.from_pretrained(job["folder"])
    config.transformer_layer_config._attn_implementation = "eager"
    model = SpeculatorModel.from_pretrained(job["folder"], config=config)
    # The target's embeddings: speculators 0.9 draws them at random where an EAGLE-3 folder has no copy.
    model._load_verifier_weights(overwrite_embed_tokens=True)
    return model


def run_speculators(job, inputs):
    model = (make_speculators(job, inputs) if "network" in job else load_speculators(job)).eval()
    found = []
    model.lm_head.register_forward_hook(lambda module, given, output: found.append(output[0]))
    ids, features = inputs["ids"], inputs["features"].flatten(1)
    documents = torch.zeros(1, len(ids), dtype=torch.long)
    if job["kind"] == "eagle3":
        model(
            hidden_states=features[None, :-1],
            input_ids=ids[None, 1:],
            document_ids=documents[:, 1:],
            position_ids=torch.arange(len(ids) - 1)[None],
            ttt_steps=job["steps"],
        )
        return torch.stack(found)
    anchors = inputs["anchors"]
    mask = torch.zeros(1, len(ids), dtype=torch.bool)
    mask[0, anchors] = True
    if job["kind"] == "dspark":
        # what its forward hands to its loss: corrected logits after true tokens, and the confidence's
        dspark.compute_metrics = lambda logits, targets, sure, *_, **__: (
            found.append((logits, sure)) or (0, {})
        )
    (model if job["kind"] == "dspark" else model._backbone_forward)(
        hidden_states=features[None],
        input_ids=ids[None],
        loss_mask=mask,
        verifier_last_hidden_states=torch.zeros(
            1, len(ids), model.config.transformer_layer_config.hidden_size
        ),
        document_ids=documents,
        max_anchors=len(anchors),
    )
    if job["kind"] == "dspark":
        logits, sure = found[-1]
        both = logits[0] if sure is None else torch.cat([logits[0], sure[0, :, None]], -1)
        return both.unflatten(0, (len(anchors), -1))
    return found[-1].unflatten(0, (len(anchors), -1))


def run_dflash(job, inputs):
    from dflash.model import DFlashDraftModel as Reference

    if "network" in job:
        config = Qwen3Config(**job["network"])
        for key, value in job["own"].items():
            setattr(config, key, value)
        model = Reference(config)
        randomise(model, job["seed"])
        model.save_pretrained(job["folder"])
    else:
        model = Reference.from_pretrained(job["folder"])
    target = AutoModelForCausalLM.from_pretrained(job["target"])
    ids, features, size = inputs["ids"], inputs["features"].flatten(1), model.block_size
    found = []
    for anchor in inputs["anchors"].tolist():
        block = torch.full((1, size), model.mask_token_id)
        block[0, 0] = ids[anchor]
        hidden = model.eval()(
            position_ids=torch.arange(anchor + size)[None],
            noise_embedding=target.get_input_embeddings()(block),
            target_hidden=features[None, :anchor],
        )
        found.append(model.compute_logits(hidden, target.lm_head)[0])
    return torch.stack(found)


@torch.no_grad()
def run(job):
    inputs = load_file(job["inputs"])
    logits = (run_dflash if job["library"] == "dflash" else run_speculators)(job, inputs)
    save_file({"logits": logits.float().contiguous()}, job["outputs"])
    return {"shape": list(logits.shape)}


run_jobs("speculators", "", run)
