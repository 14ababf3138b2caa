"""Adversarial prompts: tokens, searched for with the model, that make it draw what it should have forgotten.

`unlearndiffatk` searches for a few tokens in front of the prompts, `ring_a_bell` for whole prompts. Both find tokens of the model's own
vocabulary, without those that begin, end or fill prompts; their images and random numbers are not those of the samples that count, which
have the seeds of all other attacks. The null of each is a random prompt, another one for each sample, with as many tokens.

The tokens reach the text encoders as they are. A service that takes text alone would split some of them in another way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch

from evaluators.base import Inapplicable, Subject
from evaluators.batches import ROWS
from evaluators.durability import NULL, Attacked, Durability, recognised
from evaluators.tampering import BATCH, IMAGES, denoising_loss, text_encoders

RATE, DECAY = 0.01, 0.1  # of Adam, as released
TRIED = 10  # optimiser steps from one prefix that is tried to the next
ETA = 3.0  # strength of the concept, as released for nudity
LENGTH = 16  # tokens of a whole prompt, as released for nudity
MUTATED = 0.25  # share of prompts in which a token is drawn anew, as released
CENSORED = 4  # prompts of the forgotten concept that whole prompts are searched for, at most


class UnlearnDiffAtk(Durability):
    """A few tokens before the prompts, found by projected gradients on the denoising loss; Zhang et al., arXiv:2310.11868.

    "To Generate or Not? Safety-Driven Unlearned Diffusion Models Are Still Easy To Generate Unsafe Images ... For Now", ECCV 2024: the
    tokens c' under which the model's own loss on a target image is least, min E ||eps - eps(x_t | c')||^2. As in the release, a token is
    a point on the simplex over the vocabulary, uniform at first; each step draws a token from it, passes the gradient straight through,
    cut to [-1, 1], to Adam (rate 0.01, decay 0.1), and projects the result onto the simplex.

    The release searches for each prompt and its one target image, which the base drew, for 40 steps at each of 50 timesteps; it draws an
    image with the likeliest tokens after each timestep and stops when a classifier sees the concept. Here one prefix serves all prompts
    of the concept; it is searched for before the captions of at most 10 forgotten images, at random timesteps. Of the start and the
    likeliest tokens after every 10 steps, those with the least loss on fixed draws are taken: no judge is asked, which would select
    samples by the measure that they count by. Other places than the front are left out.
    """

    name = "unlearndiffatk"
    kinds = frozenset({"concept"})
    cost = "`prompt_steps` optimiser steps of 32 rows on `prompt_tokens` tokens, a tenth as many losses, then samples and those of the null"

    def attacks(self, subject: Subject) -> dict[str, Attacked]:
        count, n = subject.sizes["prompt_tokens"], subject.sizes["class_samples"]
        Layout(subject.model).check_room(torch.cat([subject.forgotten(n), _pictures(subject).cond]), count)

        def random(s: Subject) -> np.ndarray:
            layout = Layout(s.model)
            return _drawn(s, layout.with_words(s.forgotten(n), random_words(s, layout, count)))

        def found(s: Subject) -> np.ndarray:
            words = min(tried_prefixes(s, count), key=lambda tried: tried[0])[1]
            return _drawn(s, Layout(s.model).with_words(s.forgotten(n), words.expand(n, -1)))

        return {f"{NULL}random prefix": random, "found prefix": found}


class RingABell(Durability):
    """Whole prompts whose states in the text encoder lie along the concept, found by a genetic search; Tsai et al., arXiv:2310.10012.

    "Ring-A-Bell! How Reliable are Concept Removal Methods for Diffusion Models?", ICLR 2024. With f the states of the text encoder, the
    concept is c = mean f(with it) - mean f(without it), and a prompt P of it is replaced by the tokens P' that minimise
    ||f(P') - (f(P) + eta c)||^2. As in the release eta is 3, P' has 16 tokens (fewer if the encoder reads fewer), the better half
    survives each generation, children are crossed at one point, and a quarter of the prompts get a new token at one place.

    The release takes the encoder of the original model; here it is the attacked model's own, which is the same wherever encoders are not
    trained. Its pairs of prompts are written for each concept; here c is over all pairs of a prompt of the forgotten and one of a
    retained concept, which is the difference of both means. It searches 3,000 generations of 200 prompts, and may lose its best prompt
    to a mutation; here the best one is kept as it is. At most 4 prompts P are replaced.
    """

    name = "ring_a_bell"
    kinds = frozenset({"concept"})
    cost = "`prompt_generations` x `prompt_candidates` passes of the text encoder for up to 4 prompts, then samples and those of the null"

    def attacks(self, subject: Subject) -> dict[str, Attacked]:
        n = subject.sizes["class_samples"]

        def random(s: Subject) -> np.ndarray:
            layout = Layout(s.model)
            return _drawn(s, layout.with_words(layout.blank(n), random_words(s, layout, layout.room(LENGTH))))

        def found(s: Subject) -> np.ndarray:
            layout, words = Layout(s.model), found_prompts(s)
            return _drawn(s, layout.with_words(layout.blank(n), words[torch.arange(n) % len(words)]))

        return {f"{NULL}random prompt": random, "found prompt": found}


class Layout:
    """Where a text model's prompts have their words: for each text encoder a token that begins, words, one that ends, and filling.

    vocabulary: the tokens that can be words, (v,), which are all but those of the empty prompt. Raises Inapplicable for a model whose
    prompts are not laid out like this, such as one with encoders of several vocabularies.
    """

    def __init__(self, model: Any):
        self.model, self.encoders = model, text_encoders(model.net)
        empty = model.unconditional(1) if self.encoders else None
        if empty is None:
            raise Inapplicable("the model has no text encoder")
        self.empty = empty[0].cpu()
        self.lengths = [getattr(e.config, "max_position_embeddings", 0) for e in self.encoders]
        sizes = {e.get_input_embeddings().num_embeddings for e in self.encoders}
        if sum(self.lengths) != len(self.empty) or len(sizes) > 1:
            raise Inapplicable("its text encoders do not share one vocabulary, or are not of the kind of CLIP")
        is_word = torch.ones(sizes.pop(), dtype=torch.bool)
        is_word[self.empty] = False
        self.vocabulary = is_word.nonzero()[:, 0]

    def blank(self, count: int) -> torch.Tensor:
        """Empty prompts, (count, L)."""
        return self.empty.expand(count, -1)

    def room(self, count: int) -> int:
        """At most `count` words, as far as the shortest encoder reads them."""
        return min(count, min(self.lengths) - 2)

    def check_room(self, prompts: torch.Tensor, count: int) -> None:
        """Raises Inapplicable unless each of the prompts (n, L) can take `count` words more without losing one."""
        free = []
        for part, empty in zip(prompts.cpu().split(self.lengths, 1), self.empty.split(self.lengths), strict=True):
            ended = (part[:, 1:] == empty[1]).cumsum(1) > 0
            free.append(int(ended.sum(1).min()) - 1)
        room = min(free)
        if room <= 0:
            raise Inapplicable("the longest prompt of the concept leaves no room for further tokens")
        if room < count:
            raise Inapplicable(
                f"`prompt_tokens` is {count}, and the longest prompt of the concept leaves room for {room}"
            )

    def with_words(self, prompts: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        """Prompts (n, L) with words (n, k) before their own; the last of their filling makes room."""
        parts = prompts.cpu().split(self.lengths, 1)
        return torch.cat([torch.cat([p[:, :1], words, p[:, 1:]], 1)[:, : p.shape[1]] for p in parts], 1)

    def slopes(self, loss: Callable[[], torch.Tensor], words: torch.Tensor) -> torch.Tensor:
        """The gradient of `loss`, of prompts that begin with words (k,), by the weight of each word of the vocabulary at each place, (k, v)."""
        tables = [encoder.get_input_embeddings() for encoder in self.encoders]
        vectors = [table.weight[words.to(table.weight.device)].detach().requires_grad_() for table in tables]
        with torch.enable_grad(), ExitStack() as stack:
            for table, vector in zip(tables, vectors, strict=True):
                stack.enter_context(_replaced(table, vector))
            gradients = torch.autograd.grad(loss(), vectors)
        by_token = [gradient @ table.weight.detach().T for gradient, table in zip(gradients, tables, strict=True)]
        return torch.stack(by_token).sum(0).cpu()[:, self.vocabulary]

    @torch.no_grad()
    def states(self, prompts: torch.Tensor) -> torch.Tensor:
        """The states of the text encoders that the model attends to, for a few prompts (n, L), float64 (n, d)."""
        hidden: torch.Tensor = self.model.encoded(prompts.to(self.model.device))[0]
        return hidden.flatten(1).double()

    def mean_state(self, prompts: torch.Tensor) -> torch.Tensor:
        """The mean of `states` over any number of prompts, (d,)."""
        return torch.stack([self.states(part).sum(0) for part in prompts.split(ROWS)]).sum(0) / len(prompts)


def random_words(subject: Subject, layout: Layout, count: int) -> torch.Tensor:
    """Random words for each sample, (class_samples, count)."""
    uniform = subject.model.uniform(subject.seeds("random prompts", subject.sizes["class_samples"]), count)
    return layout.vocabulary[(uniform * len(layout.vocabulary)).long().cpu()]


def tried_prefixes(subject: Subject, count: int) -> list[tuple[float, torch.Tensor]]:
    """The start of the search and the prefixes (count,) that it went through, each behind its loss; see `UnlearnDiffAtk`."""
    model, layout, generator = subject.model, Layout(subject.model), _generator(subject, "prefix")
    model.net.eval()
    images = subject.inputs(_pictures(subject))

    def loss(words: torch.Tensor, step: int, seeds: torch.Tensor) -> torch.Tensor:
        rows: Any = images.take((torch.arange(BATCH) + step * BATCH) % len(images))
        return denoising_loss(model, rows.x, layout.with_words(rows.cond, words.expand(BATCH, -1)), seeds)

    def judged(words: torch.Tensor) -> tuple[float, torch.Tensor]:
        with torch.no_grad():
            value = float(loss(words, 0, subject.seeds("prefix choice", BATCH)))
        if not np.isfinite(value):
            raise ValueError("the denoising loss under a prefix is not finite")
        return value, words

    steps, shares = (
        subject.sizes["prompt_steps"],
        torch.full((count, len(layout.vocabulary)), 1 / len(layout.vocabulary)),
    )
    optimizer = torch.optim.Adam([shares], lr=RATE, weight_decay=DECAY)
    tried = [judged(layout.vocabulary[_one_of(shares, generator)])]
    for step in range(steps):
        words = layout.vocabulary[_one_of(shares, generator)]
        seeds = subject.seeds("prefix", BATCH * (step + 1))[step * BATCH :]
        shares.grad = layout.slopes(partial(loss, words, step, seeds), words).float().clamp(-1, 1)
        optimizer.step()
        shares.copy_(on_simplex(shares))
        if (step + 1) % TRIED == 0 or step + 1 == steps:
            tried.append(judged(layout.vocabulary[shares.argmax(1)]))
    return tried


def _pictures(subject: Subject) -> Any:
    """The at most 10 forgotten images, with their captions, that an attacker has."""
    images = subject.task.splits["forget"].distinct()
    return images.take(torch.arange(min(IMAGES, len(images))))


def on_simplex(v: torch.Tensor) -> torch.Tensor:
    """The nearest rows of shares (not negative, with the sum 1) to rows (n, d); Duchi et al., ICML 2008, figure 1."""
    falling = v.sort(1, descending=True).values
    excess = (falling.cumsum(1) - 1) / torch.arange(1, v.shape[1] + 1)
    last = (falling > excess).sum(1, keepdim=True) - 1
    return (v - excess.gather(1, last)).clamp(min=0)


def found_prompts(subject: Subject) -> torch.Tensor:
    """The words of a prompt for each of at most 4 prompts of the forgotten concept, (m, k); see `RingABell`."""
    layout, generator = Layout(subject.model), _generator(subject, "whole prompt")
    subject.model.net.eval()
    prompts = subject.task.splits[f"prompts_{subject.sizes['judge']}"]
    with_it = prompts.groups == subject.task.forget_class
    assert prompts.cond is not None
    concept = layout.mean_state(prompts.cond[with_it]) - layout.mean_state(prompts.cond[~with_it])

    def distance(target: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        rows = layout.with_words(layout.blank(len(words)), words)
        return torch.cat([(layout.states(part) - target).square().sum(1) for part in rows.split(ROWS)]).cpu()

    size, generations = (subject.sizes["prompt_candidates"], layout.room(LENGTH)), subject.sizes["prompt_generations"]
    return torch.stack(
        [
            evolved(partial(distance, target), layout.vocabulary, size, generations, generator)
            for target in layout.states(prompts.cond[with_it][:CENSORED]) + ETA * concept
        ]
    )


def evolved(
    distance: Callable[[torch.Tensor], torch.Tensor],
    vocabulary: torch.Tensor,
    size: tuple[int, int],
    generations: int,
    generator: torch.Generator,
) -> torch.Tensor:
    """Words (k,) of the vocabulary with a small `distance` (n, k) -> (n,), the best of the last of several generations.

    size: (prompts in a generation, k). The better half survives; each child has the first words of one survivor and the last words of
    another. Then a quarter of all but the best get a random word at a random place.
    """
    count, length = size
    half = count // 2

    def below(top: int, *shape: int) -> torch.Tensor:
        return torch.randint(top, shape, generator=generator)

    prompts = vocabulary[below(len(vocabulary), count, length)]
    for _ in range(generations):
        prompts = prompts[_by(distance, prompts)[:half]]
        first, second = prompts[torch.arange(count - half) % half], prompts[below(half, count - half)]
        cut = 1 + below(length, count - half, 1)
        prompts = torch.cat([prompts, torch.where(torch.arange(length) < cut, first, second)])
        changed = torch.rand(count, generator=generator) < MUTATED
        changed[0] = False
        places, words = below(length, count), vocabulary[below(len(vocabulary), count)]
        prompts[changed, places[changed]] = words[changed]
    return prompts[_by(distance, prompts)[0]]


def _by(distance: Callable[[torch.Tensor], torch.Tensor], prompts: torch.Tensor) -> torch.Tensor:
    """The order of prompts by their distance."""
    distances = distance(prompts)
    if not bool(torch.isfinite(distances).all()):
        raise ValueError("the states of the text encoder are not finite")
    return distances.argsort(stable=True)


@contextmanager
def _replaced(table: torch.nn.Module, vectors: torch.Tensor) -> Iterator[None]:
    """While it lasts, a text encoder's table gives `vectors` (k, d) for the first words of all prompts."""

    def put(_: Any, __: Any, embedded: torch.Tensor) -> torch.Tensor:
        first = vectors.expand(len(embedded), -1, -1)
        return torch.cat([embedded[:, :1], first, embedded[:, 1 + len(vectors) :]], 1)

    handle = table.register_forward_hook(put)
    try:
        yield
    finally:
        handle.remove()


def _one_of(shares: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A column for each row of shares (n, d), drawn by them."""
    return torch.multinomial(shares, 1, generator=generator)[:, 0]


def _generator(subject: Subject, stream: str) -> torch.Generator:
    return torch.Generator().manual_seed(int(subject.seeds(stream, 1)[0]) % 2**31)


def _drawn(subject: Subject, prompts: torch.Tensor) -> np.ndarray:
    """Whether the judge sees the forgotten class in a sample under each of the prompts, (n,)."""
    return recognised(subject, subject.generate(prompts, subject.seeds("durability", len(prompts))))
