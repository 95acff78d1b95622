"""The laws every causal model keeps, as functions over any model; each family's tests call them.

They hold in float64 to 1e-6 on weights moved away from their neutral start (a zero projection or a
gain of one hides mistakes)."""

import copy

import torch

TOLERANCE = 1e-6


def perturbed(model, seed: int = 0, scale: float = 0.3):
    """A float64 copy in eval mode with every weight moved by noise of `scale` times its own size
    (at least 0.02)."""
    model = copy.deepcopy(model).double().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in dict.fromkeys(model.parameters()):
            size = max(float(p.square().mean().sqrt()), 0.02)
            p += scale * size * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return model


def random_ids(model, batch: int, length: int, seed: int = 0):
    "Random token ids `(batch, length)`."
    return torch.randint(model.config.vocab_size, (batch, length),
                         generator=torch.Generator().manual_seed(seed))


def _close(a, b, what: str):
    assert a.dtype == torch.float64, "the laws are tested in float64"
    difference = (a - b).abs().max().item()
    assert difference <= TOLERANCE * max(1.0,
                                         b.abs().max().item()), f"{what}: logits differ by {difference:.2e}"


@torch.no_grad()
def check_causal(model, length: int = 24, seed: int = 0):
    "Changing token t changes no logit before t, and does change the one at t."
    ids = random_ids(model, 2, length, seed)
    before = model(ids, use_cache=False).logits
    for t in range(length):
        changed = ids.clone()
        changed[:, t] = (changed[:, t] + 1) % model.config.vocab_size
        after = model(changed, use_cache=False).logits
        if t: _close(after[:, :t], before[:, :t], f"causal, token {t}")
        assert (after[:, t] - before[:,
                                     t]).abs().max() > 1e-9, f"causal: token {t} has no influence at all"


@torch.no_grad()
def check_one_model(model, length: int = 20, seed: int = 0):
    """Step-by-step decoding equals the full forward pass, after a prefill of any length, and in
    chunks of any size."""
    ids = random_ids(model, 3, length, seed)
    full = model(ids, use_cache=False).logits
    for prefill in range(1, length):
        for cache in (None, model.make_cache(3, length), model.make_cache(3, prefill)):
            output = model(ids[:, :prefill], past_key_values=cache, use_cache=True)
            pieces = [output.logits]
            for t in range(prefill, length):
                output = model(ids[:, t:t + 1], past_key_values=output.past_key_values,
                               use_cache=True)
                pieces.append(output.logits)
            _close(torch.cat(pieces, 1), full, f"one model, prefill of {prefill}")
    for chunk in (2, 3, 7):
        cache, pieces = None, []
        for piece in ids.split(chunk, 1):
            output = model(piece, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            pieces.append(output.logits)
        _close(torch.cat(pieces, 1), full, f"one model, chunks of {chunk}")


def _padded(rows: list, side: str, pad: int, extra: int = 0):
    "Rows as `(ids, mask)`, padded at `side` to the longest and `extra` more."
    width = max(len(r) for r in rows) + extra
    ids, mask = torch.full((len(rows), width), pad), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, where], mask[i, where] = row, 1
    return ids, mask


@torch.no_grad()
def check_alone_or_together(model, lengths=(1, 5, 11, 17), seed: int = 0):
    """An example's logits depend neither on its batch mates nor on padding at either side, nor on
    what stands in the padding."""
    rows = [random_ids(model, 1, n, seed + i)[0] for i, n in enumerate(lengths)]
    alone = [model(r[None], use_cache=False).logits[0] for r in rows]
    for side in ("left", "right"):
        for pad, extra in ((0, 0), (3, 0), (3, 4)):
            ids, mask = _padded(rows, side, pad, extra)
            together = model(ids, attention_mask=mask, use_cache=False).logits
            for i, want in enumerate(alone):
                _close(together[i][mask[i].bool()], want,
                       f"alone or together, padding {side}, row {i}")


@torch.no_grad()
def check_ragged_decoding(model, lengths=(1, 4, 9), steps: int = 6, seed: int = 0):
    """Rows of different lengths, padded at either side, prefilled together and stepped together,
    give the logits of each row alone."""
    whole = [random_ids(model, 1, n + steps, seed + i)[0] for i, n in enumerate(lengths)]
    alone = [model(r[None], use_cache=False).logits[0] for r in whole]
    for side in ("left", "right"):
        ids, mask = _padded([r[:n] for r, n in zip(whole, lengths)], side, 1)
        output = model(ids, attention_mask=mask, use_cache=True)
        for step in range(steps):
            mask = torch.cat([mask, mask.new_ones(len(whole), 1)], 1)
            tokens = torch.stack([r[n + step] for r, n in zip(whole, lengths)])[:, None]
            output = model(tokens, attention_mask=mask, past_key_values=output.past_key_values,
                           use_cache=True)
            for i, n in enumerate(lengths):
                _close(output.logits[i, -1], alone[i][n + step],
                       f"ragged decoding, padding {side}, row {i}, step {step}")


def check_laws(model, **kwargs):
    "All of them on a perturbed float64 copy."
    model = perturbed(model)
    check_causal(model)
    check_one_model(model)
    check_alone_or_together(model)
    check_ragged_decoding(model)
