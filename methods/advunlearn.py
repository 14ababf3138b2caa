"""AdvUnlearn: the text encoder is erased under attack, by ESD on prompts that an adversary has just found.

Source: Zhang et al., "Defensive Unlearning with Adversarial Training for Robust Concept Erasure in Diffusion Models", NeurIPS 2024,
arXiv:2405.15234, and the released code. eps0 is the frozen base model, c the concept's prompt, c_r one of the kept prompts.
    attack  c' = argmin_v mean |eps_theta(x_t, [v, c]) - eps0(x_t, c)|^2       v: `tokens` word embeddings in front of the prompt
    erase   minimise  mean |eps_theta(x_t, c') - y|^2 + gamma mean |eps_theta(x_t, c_r) - eps0(x_t, c_r)|^2
            y = eps0(x_t, null) - eta (eps0(x_t, c) - eps0(x_t, null))
over theta, the layers of the text encoder without its embeddings; v is a constant of the second line, theta of the first. No image is
read: x_t is sampled as in ESD, under c or c_r, by the base model, because the release samples with the embeddings of
the frozen encoder. The attack is made anew at every step but the first `plain_steps`, whose prompt is c. v starts at random words, or where
the last attack ended, and takes `attack_steps` steps of Adam, each on new images; `attack: sign` gives Adam the gradient's sign
(the release's "fast" variant). The release never clears the gradient of v between these steps, so each step follows the sum of all
gradients so far (`attack_gradient: accumulated`), in the variant of signs the sign of the last sign plus the gradient. It also discards the
last of the steps. Neither has a projection: nothing bounds v.

Tokens are shifted to the right for v, so prompts lose as many tokens at the end as v has; the last ones must be padding. The release
counts the words of c as its tokens, and so loses the end of words that are several. Each row has its own t and c_r, where the release draws
one t per step. Not implemented: v in other places of the prompt, attacks on the encoder's output, several concepts, the retain
loss in steps of its own (`--retain_train iter`), and training the U-Net instead.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn

from methods import gradients
from methods.base import Descent, Goal, Model, Scalars
from methods.esd import target
from methods.losses import pick
from methods.partial import Sampled, partial_samples
from methods.rows import SEEDS, Batch, Draw, Rows


class AdvUnlearnSettings(Sampled):
    """Settings of AdvUnlearn."""

    lr: float = Field(1e-5, gt=0, description="learning rate (released: 1e-5)")
    steps: int = Field(1000, ge=0, description="optimiser steps (released: 1000)")
    batch_size: int = Field(1, ge=1, description="rows of the erasing loss and of the attack (released: 1)")
    retain_batch_size: int = Field(5, ge=1, description="rows of the retain loss (released: 5)")
    eta: float = Field(1.0, gt=0, description="strength of the negative guidance (released: 1)")
    gamma: float = Field(0.3, ge=0, description="weight of the retain loss (released: 0.3)")
    plain_steps: int = Field(200, ge=0, description="first steps, without attack (released: 200)")
    tokens: int = Field(1, ge=1, description="adversarial word embeddings in front of the prompt (released: 1)")
    attack_steps: int = Field(
        30, ge=1, description="steps of each attack (released: 30, of which the last is discarded)"
    )
    attack_lr: float = Field(1e-3, gt=0, description="learning rate of the attack (released: 1e-3)")
    attack: Literal["gradient", "sign"] = Field(
        "gradient", description="what the attack's Adam follows; sign: as in the released fast variant"
    )
    attack_gradient: Literal["fresh", "accumulated"] = Field(
        "fresh", description="gradient of one step, or sum over those of an attack (released: accumulated)"
    )
    attack_from: Literal["random", "latest"] = Field(
        "random", description="where an attack starts: random words, or the end of the last attack (released: random)"
    )
    encoder_layers: int | None = Field(
        None, ge=1, description="first layers of the encoder that change; null: all, and the last norm (released: null)"
    )
    timestep: Literal["level", "older_release"] = Field(
        "level", description="t given to the networks (released: older_release)"
    )
    sample_from: Literal["trained", "base"] = Field(
        "base", description="the model that x_t is sampled from (released: base)"
    )


class AdvUnlearn(Descent):
    """Adversarial training of the text encoder; arXiv:2405.15234."""

    name = "advunlearn"
    source = "Zhang et al., NeurIPS 2024, arXiv:2405.15234"
    needs = frozenset()
    abilities = frozenset({"a trainable text encoder"})
    kinds = frozenset({"concept"})
    # 5 for the row that is erased, 4 for each of 5 retained ones, 4 for each of 30 steps of the attack; and the DDIM runs of them all
    forwards_per_step = 145
    copies = 6  # of the encoder's layers; an upper bound where more may change than those
    Hyperparameters = AdvUnlearnSettings
    hp: AdvUnlearnSettings

    def setup(self) -> None:
        super().setup()
        trained = set(map(id, self.params))
        shared = {id(p): p for p in self.model.net.parameters() if id(p) not in trained}
        self.base = self.model.with_net(copy.deepcopy(self.model.net, shared).eval())
        self.words: torch.Tensor | None = None  # of the last attack
        self.kept = self.goal.conditions(self.goal.kept, self.params[0].device)

    @classmethod
    def unsuited(cls, hyperparameters: Any, model: Model, goal: Goal) -> list[str]:
        hp, reasons, null = hyperparameters, [], model.unconditional(1)
        tables = word_tables(model.net)
        if len(tables) != 1 or null is None:
            return [f"it attacks the prompts of one text encoder, and this model has {len(tables)}"]
        if not any(p.requires_grad and encodes(n, hp.encoder_layers) for n, p in model.net.named_parameters()):
            reasons.append("no layer of this model's text encoder may change (train.modules)")
        if goal.concept is not None and set(goal.concept[-hp.tokens :]) != {int(null[0, -1])}:
            reasons.append(f"tokens: the prompt leaves no room for {hp.tokens} more")
        if hp.gamma and not goal.kept:
            reasons.append("gamma: the task has no prompts of other concepts; set it to 0")
        if hp.sampler_steps > len(model.alphas):
            reasons.append(
                f"sampler_steps: {hp.sampler_steps} is more than the {len(model.alphas)} steps of the schedule"
            )
        return reasons

    def trains(self, name: str) -> bool:
        return encodes(name, self.hp.encoder_layers)

    def draws(self) -> dict[str, Draw]:
        erased = {"forget": Draw(self.hp.batch_size, split=SEEDS)}
        return erased | ({"retain": Draw(self.hp.retain_batch_size, split=SEEDS)} if self.hp.gamma else {})

    def direction(self, batch: Batch) -> tuple[torch.Tensor, Scalars]:
        losses: Scalars = {}
        attacked = self.done >= self.hp.plain_steps
        if attacked:
            self.words, losses["attack_loss"] = self.attack(batch["forget"])

        def each() -> Iterator[torch.Tensor]:  # one graph at a time
            loss = self.erasing_loss(batch["forget"], self.words if attacked else None)
            losses["erasing_loss"] = loss.detach()
            yield loss
            if self.hp.gamma:
                loss = self.retain_loss(batch["retain"])
                losses["retain_loss"] = loss.detach()
                yield self.hp.gamma * loss

        return self.gradient(each()), gradients.scalars(**losses)

    def partial_samples(self, seeds: torch.Tensor, cond: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(x_t, t) under `cond`, see `methods.partial`."""
        return partial_samples(self.model if self.hp.sample_from == "trained" else self.base, cond, seeds, self.hp)

    def erasing_loss(self, rows: Rows, words: torch.Tensor | None) -> torch.Tensor:
        """This rank's part of ESD's loss under the concept's prompt, behind adversarial words if there are any."""
        with torch.no_grad():
            cond = self.goal.forgotten(len(rows.seeds), self.params[0].device)
            (x_t, t), null = self.partial_samples(rows.seeds, cond), self.model.unconditional(len(cond))
            y = target(self.base.eps(x_t, t, cond), self.base.eps(x_t, t, null), self.hp.eta)
        self.model.net.train()
        return distance(behind(self.model, words, x_t, t, cond), y, rows.total)

    def retain_loss(self, rows: Rows) -> torch.Tensor:
        """This rank's part of the distance to the base model under prompts that are kept."""
        cond = pick(self.model, rows, self.kept, 2)
        with torch.no_grad():
            x_t, t = self.partial_samples(rows.seeds, cond)
            y = self.base.eps(x_t, t, cond)
        self.model.net.train()
        return distance(self.model.eps(x_t, t, cond), y, rows.total)

    def attack(self, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        """(adversarial words (tokens, width), this rank's part of their last loss); the words are the same on all ranks."""
        hp, model = self.hp, self.model
        cond = self.goal.forgotten(len(rows.seeds), self.params[0].device)
        start = self.words if hp.attack_from == "latest" and self.words is not None else self.random_words(rows)
        words = start.clone().requires_grad_()
        adam, loss = torch.optim.Adam([words], lr=hp.attack_lr), words.new_zeros(())
        for k in range(1, hp.attack_steps + 1):
            with torch.no_grad():
                x_t, t = self.partial_samples(rows.reseeded(k).seeds, cond)
                y = self.base.eps(x_t, t, cond)
            model.net.eval()
            loss = distance(behind(model, words, x_t, t, cond), y, rows.total)
            (gradient,) = torch.autograd.grad(loss, [words])
            gradients.sum_over_ranks(gradient)
            if hp.attack_gradient == "accumulated" and words.grad is not None:
                gradient += words.grad
            words.grad = gradient.sign() if hp.attack == "sign" else gradient
            adam.step()
        return words.detach(), loss.detach()

    def random_words(self, rows: Rows) -> torch.Tensor:
        """Embeddings of random words, (tokens, width), which depend on the seeds of all ranks' rows."""
        (table,) = word_tables(self.model.net)
        u = gradients.sum_over_ranks(self.model.uniform(rows.second_seeds, self.hp.tokens).double().sum(0)) % 1
        chosen = (u * table.num_embeddings).long().clamp(max=table.num_embeddings - 1)
        return table.weight[chosen.to(table.weight.device)].detach()

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"words": self.words}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        words = state["words"]
        self.words = None if words is None else words.to(self.params[0])


def distance(eps: torch.Tensor, y: torch.Tensor, total: int) -> torch.Tensor:
    """This rank's part of the mean squared distance of rows (n, C, H, W), over elements and the `total` rows of all ranks."""
    return (eps - y).square().flatten(1).mean(1).sum() / total


def encodes(name: str, layers: int | None) -> bool:
    """Whether a parameter is of the first `layers` of a text encoder; None: of any layer, or of the norm that follows."""
    if not name.startswith("text_encoder"):
        return False
    number = re.search(r"\.encoder\.layers\.(\d+)\.", name)
    if number is None:
        return layers is None and ".final_layer_norm." in name
    return layers is None or int(number[1]) < layers


def word_tables(net: Any) -> list[nn.Embedding]:
    """The word embeddings of the text encoders, each (words, width)."""
    return [m for n, m in net.named_modules() if isinstance(m, nn.Embedding) and n.endswith("token_embedding")]


def behind(
    model: Model, words: torch.Tensor | None, x_t: torch.Tensor, t: torch.Tensor, cond: torch.Tensor
) -> torch.Tensor:
    """The predicted noise under prompts (n, L) with `words` (k, width) inserted after their first token; None: none."""
    if words is None:
        return model.eps(x_t, t, cond)
    k, inserted = len(words), words
    shifted = torch.cat(
        [cond[:, : 1 + k], cond[:, 1 : cond.shape[1] - k]], 1
    )  # the k tokens after the first are replaced
    (table,) = word_tables(model.net)

    def replace_words(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        given = inserted.to(output).expand(len(output), -1, -1)
        return torch.cat([output[:, :1], given, output[:, 1 + k :]], 1)

    with table.register_forward_hook(replace_words):
        return model.eps(x_t, t, shifted)
