"""One training run: the model, its copy in bf16, the optimizer and the place, kept in checkpoints; it resumes when started again."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from training.sets import SEED
from training.student import READING_LAYERS, is_stored_as_float8, rounded

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

SAVE_STEPS, KEEP_STEPS = 100, 400


def command_line(about: str | None, steps: int) -> argparse.ArgumentParser:
    """What every step that trains is given: `work`, `out` and `steps`."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--work", type=Path, required=True, help="directory that the steps before have filled")
    parser.add_argument("--out", type=Path, required=True, help="directory for checkpoints")
    parser.add_argument("--steps", type=int, default=steps, help=f"default {steps:,}")
    return parser


def average(paths: Sequence[Path]) -> dict[str, Any]:
    """The mean of the weights of several checkpoints."""
    states = [torch.load(path) for path in paths]
    return {name: sum(state[name] for state in states) / len(states) for name in states[0]}


class Run:
    """What writes the marks of `training.joined` stays as it is: a step of the optimizer there, small as it is, opens the gates between the texts."""

    def __init__(self, build: Callable[[], Any], out: Path, marks: Sequence[int] = ()) -> None:
        """From what `build` makes anew each time, float32; what asks for gradients learns, but for what writes the marks."""
        torch.manual_seed(SEED)
        out.mkdir(parents=True, exist_ok=True)
        self.out, self.step = out, 0
        self.master = build()  # float32: small updates would be lost in bf16
        self.model = build().to(torch.bfloat16)
        self._masters = [one for one in self.master.parameters() if one.requires_grad]
        self._copies = [one for one in self.model.parameters() if one.requires_grad]
        self._coarse = {id(one) for name, one in self.model.named_parameters() if is_stored_as_float8(name)}
        self.optimizer = torch.optim.AdamW(self._masters, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
        self._free = self._free_weights(list(marks)) if marks else {}
        if (out / "last.pt").exists():
            kept = torch.load(out / "last.pt")
            self.master.load_state_dict(kept["model"])
            self.optimizer.load_state_dict(kept["optimizer"])
            self.step = kept["step"]
        self._copy()

    def update(self, loss: torch.Tensor, learning_rate: float) -> None:
        """One step of the optimizer."""
        loss.backward()  # type: ignore[no-untyped-call]
        for master, copy in zip(self._masters, self._copies, strict=True):
            master.grad, copy.grad = None if copy.grad is None else copy.grad.float(), None
            if master.grad is not None and id(master) in self._free:
                master.grad *= self._free[id(master)]
        torch.nn.utils.clip_grad_norm_([one for one in self._masters if one.grad is not None], 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self._copy()
        self.step += 1

    def save(self, *, last: bool) -> None:
        """The whole state now and then; the weights alone more rarely."""
        if self.step % SAVE_STEPS == 0 or last:
            state = {"model": self.master.state_dict(), "optimizer": self.optimizer.state_dict(), "step": self.step}
            torch.save(state, self.out / "next.pt")
            os.replace(self.out / "next.pt", self.out / "last.pt")
        if self.step % KEEP_STEPS == 0 or last:
            torch.save(self.master.state_dict(), self.out / f"weights-{self.step}.pt")

    def _copy(self) -> None:
        torch._foreach_copy_([one.data for one in self._copies], [one.data for one in self._masters])
        for one in self._copies:
            if id(one) in self._coarse:  # the gradient is taken where the stored weights will be
                one.data = rounded(one.data)

    def _free_weights(self, marks: list[int]) -> dict[int, torch.Tensor]:
        """For each parameter that has a part in writing the marks, 1 where it has none."""
        free: dict[int, torch.Tensor] = {}

        def hold(parameter: torch.Tensor, *where: object) -> None:
            free.setdefault(id(parameter), torch.ones_like(parameter))[where] = 0.0  # type: ignore[index]

        embeddings = self.master.bert.embeddings
        norms = [embeddings.LayerNorm]
        for table in (embeddings.token_type_embeddings, embeddings.position_embeddings):
            hold(table.weight, slice(None), marks)
        for layer in self.master.bert.encoder.layer[:READING_LAYERS]:
            norms += [layer.attention.output.LayerNorm, layer.output.LayerNorm]
            units = layer.output.dense.weight[marks].any(0).nonzero().flatten()
            for linear in (layer.attention.output.dense, layer.output.dense):
                hold(linear.weight, marks)
                hold(linear.bias, marks)
            hold(layer.intermediate.dense.weight, units)
            hold(layer.intermediate.dense.bias, units)
            hold(layer.output.dense.weight, slice(None), units)
        for norm in norms:
            hold(norm.weight, marks)
            hold(norm.bias, marks)
        return free
