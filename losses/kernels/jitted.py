# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""The kernels: one program per step sweeps its row of logits once or twice.

| kernel | first sweep | gradient in z_j, times the step's coefficient (second sweep) |
|---|---|---|
| split, join | r = log Σ_{j outside the head} e^{z_j} | head: from the loss; rest: g_rest e^{z_j − r} |
| discounted | P = log Σ_{j≠g} w_j e^{z_j}; loss log(1 + e^D), D = P − z_g | w_j e^{z_j − L}; g: −σ(D) |
| forward KL | log-sum-exps of both rows | q_j − p_j; the loss Σ p (log p − log q) is added up here |

L is z_g + loss. The greedy token never enters the sum it is compared with: a confident drafter
keeps its small loss. Rows of any width: the last block is masked. Logits are fp32; gradients are rounded
once, to the type the products read. A program may write where another of its own threads has read: a barrier
stands in between.

Runs without a GPU by TRITON_INTERPRET=1 (tests/losses/test_losses_kernels.py).
"""

from __future__ import annotations

from typing import Any

# Bound by `make_jitted`: kernels look names up in their module, and triton is only imported when it is used.
tl: Any = None
row_level: Any = None
put_share: Any = None


def make_jitted() -> dict[str, Any]:
    """The kernels themselves, compiled at their first launch."""
    global tl, row_level, put_share
    import triton
    import triton.language as tl

    @triton.jit
    def row_level(z, vocab_size, BLOCK: tl.constexpr):
        """Log-sum-exp of a row, online: one running maximum and sum a lane, joined at the end."""
        lane = tl.arange(0, BLOCK)
        top = tl.full([BLOCK], -1e30, tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, vocab_size, BLOCK):
            here = start + lane
            x = tl.load(z + here, mask=here < vocab_size, other=float("-inf"))
            higher = tl.maximum(top, x)
            total = total * tl.exp(top - higher) + tl.exp(x - higher)
            top = higher
        highest = tl.max(top, 0)
        amount = tl.sum(total * tl.exp(top - highest), 0)
        return highest + tl.log(tl.maximum(amount, 1.1754943508222875e-38))

    @triton.jit
    def put_share(z, out, scale, level, vocab_size, BLOCK: tl.constexpr):
        """scale · e^{z_j − level} for a row, in the type of `out`."""
        lane = tl.arange(0, BLOCK)
        for start in range(0, vocab_size, BLOCK):
            here = start + lane
            inside = here < vocab_size
            x = tl.load(z + here, mask=inside, other=float("-inf"))
            tl.store(out + here, (scale * tl.exp(x - level)).to(out.dtype.element_ty), mask=inside)

    @triton.jit
    def split(
        z, ids, coarse, rest, z_stride, coarse_stride, vocab_size, kept,
        KP: tl.constexpr, TAIL: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        z += row * z_stride
        k = tl.arange(0, KP)
        is_kept = k < kept
        token = tl.load(ids + row * kept + k, mask=is_kept, other=0)
        tl.store(coarse + row * coarse_stride + k, tl.load(z + token, mask=is_kept, other=0.0), mask=is_kept)
        if TAIL:
            tl.debug_barrier()  # all copies of the picked logits are read
            tl.store(z + token, float("-inf"), mask=is_kept)
            tl.debug_barrier()
            level = row_level(z, vocab_size, BLOCK)
            tl.store(rest + row, level)
            tl.store(coarse + row * coarse_stride + kept, level)

    @triton.jit
    def join(
        z, ids, rest, grad, out, z_stride, grad_stride, out_stride, vocab_size, kept,
        KP: tl.constexpr, TAIL: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        z += row * z_stride
        out += row * out_stride
        grad += row * grad_stride
        if TAIL:
            put_share(z, out, tl.load(grad + kept), tl.load(rest + row), vocab_size, BLOCK)
            tl.debug_barrier()  # the head is written last
        k = tl.arange(0, KP)
        is_kept = k < kept
        token = tl.load(ids + row * kept + k, mask=is_kept, other=0)
        head = tl.load(grad + k, mask=is_kept, other=0.0)
        tl.store(out + token, head.to(out.dtype.element_ty), mask=is_kept)

    @triton.jit
    def discounted(
        z, ids, weight, coefficient, value, out, z_stride, out_stride, vocab_size, kept,
        KP: tl.constexpr, GRAD: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        z += row * z_stride
        out += row * out_stride
        if GRAD:
            scale = tl.load(coefficient + row)
        k = tl.arange(0, KP)
        is_kept = k < kept
        token = tl.load(ids + row * kept + k, mask=is_kept, other=0)
        greedy = tl.load(ids + row * kept)
        z_greedy = tl.load(z + greedy)
        picked = tl.load(z + token, mask=is_kept, other=0.0)
        share = tl.load(weight + row * kept + k, mask=is_kept, other=1.0)
        discount = tl.where(share > 0.0, tl.log(tl.maximum(share, 1.1754943508222875e-38)), -1e30)
        tl.debug_barrier()  # all copies of the picked logits are read
        tl.store(z + token, tl.where(k == 0, float("-inf"), picked + discount), mask=is_kept)
        tl.debug_barrier()
        ahead = row_level(z, vocab_size, BLOCK) - z_greedy  # P − z_g
        small = tl.exp(-tl.abs(ahead))
        # log(1 + small) with all digits of a small one
        grown = 1.0 + small
        log1p = tl.where(grown == 1.0, small, tl.log(grown) * (small / tl.maximum(grown - 1.0, 1e-8)))
        loss = tl.maximum(ahead, 0.0) + log1p
        tl.store(value + row, loss)
        if GRAD:
            put_share(z, out, scale, z_greedy + loss, vocab_size, BLOCK)
            tl.debug_barrier()  # the greedy token is written last
            wrong = tl.where(ahead > 0.0, 1.0, small) / (1.0 + small)  # σ(P − z_g)
            tl.store(out + greedy, (-scale * wrong).to(out.dtype.element_ty))

    @triton.jit
    def forward_kl(
        z, t, coefficient, value, out, z_stride, t_stride, out_stride, vocab_size,
        GRAD: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        z += row * z_stride
        t += row * t_stride
        out += row * out_stride
        if GRAD:
            scale = tl.load(coefficient + row)
        lane = tl.arange(0, BLOCK)
        z_level = row_level(z, vocab_size, BLOCK)
        t_level = row_level(t, vocab_size, BLOCK)
        added = tl.zeros([BLOCK], tl.float32)
        for start in range(0, vocab_size, BLOCK):
            here = start + lane
            inside = here < vocab_size
            # log 0 counts as −1e30, so that 0 · log 0 is 0
            logq = tl.maximum(tl.load(z + here, mask=inside, other=float("-inf")), -1e30) - z_level
            logp = tl.maximum(tl.load(t + here, mask=inside, other=float("-inf")), -1e30) - t_level
            p = tl.exp(logp)
            added += p * (logp - logq)
            if GRAD:
                tl.store(out + here, (scale * (tl.exp(logq) - p)).to(out.dtype.element_ty), mask=inside)
        tl.store(value + row, tl.sum(added, 0))

    return {"split": split, "join": join, "discounted": discounted, "forward_kl": forward_kl}
