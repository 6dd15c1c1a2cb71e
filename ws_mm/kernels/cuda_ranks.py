"""Mode 'sync_batch' on a CUDA device, in the kernels of the other modes.

Forward, each rank computes moments as in mode 'batch', and normalizes by
those of all ranks as in mode 'estimate' by its constants. Backward, the
gradient of constants is corrected by the sums of all ranks.

The ranks exchange numbers once each way, whatever they run. So a rank whose
kernels cannot run has to notice before it: then it takes composed operations,
and the others see no difference. Afterwards these only finish what is begun.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..distributed import all_reduced
from . import CannotLaunch, attempt, plain, plans, self_check


def batch_channel_norm(
    input: Tensor,
    num_groups: int,
    running: tuple[Tensor, Tensor],
    affines: plain.Affines,
    momentum: float,
    eps: float,
    update: bool,
) -> Tensor | None:
    """See :func:`.plain.batch_channel_norm`; None if nothing was done."""
    memory_format = plans.dense_format(input)
    of_batch, given = (
        plans.norm_plan(
            input.shape,
            input.dtype,
            memory_format,
            input.device,
            plans.known(*running, *affines),
            num_groups,
            eps,
            of_batch,
            False,
        )
        for of_batch in (True, False)
    )
    if of_batch is None or given is None:
        return None
    output: Tensor | None = attempt(
        SynchronizedNorm.apply,
        input.contiguous(memory_format=memory_format),
        *plans.dense_float32(affines),
        (running, float(momentum), update, of_batch, given),
    )
    return output


class SynchronizedNorm(torch.autograd.Function):
    """Both steps of BCN with the moments of all ranks.

    Formulas are those of :class:`.cpu.BatchChannelNorm` and
    :class:`.plain.SynchronizedBatchNorm`. Saves what mode 'batch' does.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        bn_weight: Tensor | None,
        bn_bias: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        call: tuple[
            tuple[Tensor, Tensor], float, bool, plans.NormPlan, plans.NormPlan
        ],
    ) -> Tensor:
        running, momentum, update, of_batch, given = call
        affines = bn_weight, bn_bias, weight, bias
        kept = input.new_empty(given.kept, dtype=torch.float32)
        output = torch.empty_like(input)
        count = input.numel() // input.shape[1]

        def run(
            launches: Sequence[plans.Launch], used: Sequence[Tensor]
        ) -> None:
            tensors = input, kept, output, *used, *affines
            plans.launch(launches, tensors, momentum)

        def check(plan: plans.NormPlan, before: Sequence[Tensor]) -> None:
            """Check on numbers of this rank, before another one gets any."""
            if not (plan.check.pending and plan.check.is_due('forward')):
                return
            mean, var = (values.clone() for values in before)
            run(plan.forward, (mean, var))
            with plans.checking():
                self_check.norm_forward(
                    *(plan.check, input, kept, output),
                    before=[*before],
                    running=(mean, var),
                    affines=affines,
                    momentum=momentum,
                    update=False,
                    settings=plan.settings,
                )

        check(of_batch, running)
        run(of_batch.forward[:2], running)
        own = plans.used(kept, given)
        check(given, [values.clone() for values in own])
        mean, var, total = plain.statistics_of_ranks(
            own, count, running, momentum, update
        )
        try:
            run(given.forward[1:], (mean, var))
        except CannotLaunch as failure:
            attempt(plans.fail, failure)
            output = plain.normalize(
                input.float(), *affines, mean, var, *given.settings
            ).to(input.dtype)
        ctx.save_for_backward(input, *affines, kept, mean, var, total)
        ctx.plan = given
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # A checkpoint that is not reentrant gives them only once.
        saved = ctx.saved_tensors
        tensors = None
        if not torch.is_grad_enabled():  # else someone differentiates twice
            tensors = attempt(_reduced, ctx, saved, grad)
        if tensors is not None:
            return *_finished(ctx, saved, tensors), None
        input, *affines, _, mean, var, total = saved
        num_groups, eps, _ = ctx.plan.settings
        gradients = plain.gradients(
            lambda x, a, b, c, d: plain.normalize_by_ranks(
                x.float(), a, b, c, d, mean, var, total, num_groups, eps
            ),
            [input, *affines],
            ctx.needs_input_grad[:5],
            grad,
        )
        return *gradients, None


def _reduced(
    ctx: Any, saved: tuple[Tensor, ...], grad: Tensor
) -> plans.Tensors:
    """The gradient as if the statistics were constants, not yet applied."""
    input, *affines, kept, _, _, _ = saved
    plan = ctx.plan
    needs_input = ctx.needs_input_grad[0]
    tensors = plans.backward_tensors(
        plan, grad, input, kept, affines, needs_input
    )
    plans.launch(plan.backward[:2], tensors)
    if plan.check.pending and plan.check.is_due('backward'):
        if needs_input:
            plans.launch(plan.backward[2:], tensors)
        with plans.checking():
            self_check.norm_backward(plan.check, tensors, plan.settings)
    return tensors


def _finished(
    ctx: Any, saved: tuple[Tensor, ...], tensors: plans.Tensors
) -> list[Tensor | None]:
    """All gradients, of which that of the input is corrected and applied."""
    grad, input, kept, scratch, gradient = tensors[:5]
    _, bn_weight, *_, mean, var, total = saved
    plan = ctx.plan
    if gradient is not None:
        channels = len(mean)
        # (N, C) numbers each: gradient is
        # grad * scales + (input - means) * along + constants.
        means, _, scales = _rows(kept, channels, input.shape[0])[:3]
        _, _, along, constants = _rows(scratch, channels, input.shape[0])
        inverse = torch.rsqrt(var + plan.settings[1])
        scale = inverse if bn_weight is None else inverse * bn_weight
        sums = all_reduced(torch.cat(tensors[5:7])).view(2, -1)
        slope, constant = sums * (-scale / total)
        slope = slope * inverse
        along += slope
        constants += torch.addcmul(constant, slope, means - mean)
        try:
            plans.launch(plan.backward[2:], tensors)
        except CannotLaunch as failure:
            attempt(plans.fail, failure)
            scales, means, along, constants = (
                rows.view(*rows.shape, *[1] * (input.dim() - 2))
                for rows in (scales, means, along, constants)
            )
            d = (input.float() - means) * along + constants
            gradient.copy_(grad.float() * scales + d)
    return plans.gradients(tensors)


def _rows(buffer: Tensor, channels: int, samples: int) -> Tensor:
    """The first numbers per row, each of shape (N, C)."""
    rows = samples * channels
    return buffer[: 4 * rows].view(4, samples, channels)
