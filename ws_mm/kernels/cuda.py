"""WS and BCN on a CUDA device: closed-form gradients in Triton kernels.

BCN is three launches forward and three backward, WS one each, see
:mod:`.plans`.

The interpreter of Triton (``TRITON_INTERPRET=1``) runs the same kernels on
CPU tensors; that is how the tests run them where there is no GPU.
"""

from typing import Any

import torch
from torch import Tensor

from .. import compat
from . import CannotLaunch, attempt, cuda_ranks, plain, plans, self_check

_Base: Any = torch.autograd.Function


def _apply(function: Any, x: Tensor) -> Any:
    """Return what applies a function, under no transform of ``torch.func``.

    Function.apply looks for what transforms have left over among all its
    arguments, which costs as much as some launches.
    """
    if compat.is_left_over(x):
        return function.apply
    return super(_Base, function).apply


# Weight Standardization


def standardize_weight(
    weight: Tensor, eps: float, inside: bool, dtype: torch.dtype
) -> Tensor:
    """See :func:`.plain.standardize_weight`."""
    memory_format = plans.dense_format(weight)
    plan = plans.filter_plan(
        weight.shape,
        (weight.dtype, dtype),
        memory_format,
        eps,
        inside,
        weight.device,
    )
    standardized: Tensor | None = None
    if plan is not None:
        dense = weight.contiguous(memory_format=memory_format)
        standardized = attempt(_apply(StandardizeWeight, dense), dense, plan)
    if standardized is None:
        return plain.standardize_weight(weight, eps, inside, dtype)
    return standardized


class StandardizeWeight(torch.autograd.Function):
    """``standardize_weight`` of dense filters.

    Formula, per filter of K entries with D = std + eps or sqrt(var + eps):
        output = (weight - mean) / D
        dweight = (g - mean(g) - output sum(g output) D' / (K - 1)) / D
    with D' = D / std for eps outside the root, 1 inside it.

    Saves the weight, a parameter that lives anyway: an output in the dtype
    of autocast has too few digits for the gradient.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, plan: plans.FilterPlan) -> Tensor:
        output = torch.empty_like(weight, dtype=plan.dtype)
        kept = weight.new_empty(3 * plan.rows, dtype=torch.float32)
        plans.launch(plan.forward, (weight, output, kept))
        if plan.check.pending and plan.check.is_due('forward'):
            with plans.checking():
                self_check.filters_forward(
                    plan.check, weight, output, plan.eps, plan.inside
                )
        ctx.save_for_backward(weight, kept)
        ctx.plan = plan
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        # A checkpoint that is not reentrant gives them only once.
        weight, kept = ctx.saved_tensors
        plan = ctx.plan
        gradient = None
        if not torch.is_grad_enabled():  # else someone differentiates twice
            gradient = attempt(_standardize_backward, plan, weight, kept, grad)
        if gradient is None:

            def again(weight: Tensor) -> Tensor:
                return plain.standardize_weight(
                    weight, plan.eps, plan.inside, torch.float32
                )

            (gradient,) = plain.gradients(again, [weight], [True], grad)
        return gradient, None


def _standardize_backward(
    plan: plans.FilterPlan, weight: Tensor, kept: Tensor, grad: Tensor
) -> Tensor:
    gradient = torch.empty_like(weight)
    grad = grad.contiguous(memory_format=plan.memory_format)
    plans.launch(plan.backward, (grad, weight, kept, gradient))
    if plan.check.pending and plan.check.is_due('backward'):
        with plans.checking():
            self_check.filters_backward(
                plan.check, weight, grad, gradient, plan.eps, plan.inside
            )
    return gradient


# Batch-Channel Normalization


def batch_channel_norm(
    input: Tensor,
    num_groups: int,
    running: tuple[Tensor, Tensor],
    affines: plain.Affines,
    momentum: float,
    eps: float,
    source: str,
    update: bool,
) -> Tensor:
    """See :func:`.plain.batch_channel_norm`."""
    output: Tensor | None = None
    plan: plans.NormPlan | None = None
    moved: list[Tensor] = []
    memory_format = plans.dense_format(input)
    if source == 'ranks':
        output = cuda_ranks.batch_channel_norm(
            input, num_groups, running, affines, momentum, eps, update
        )
    else:
        plan = plans.norm_plan(
            input.shape,
            input.dtype,
            memory_format,
            input.device,
            plans.known(*running, *affines),
            num_groups,
            eps,
            source == 'batch',
            update,
        )
    if plan is not None:
        output = attempt(
            _apply(BatchChannelNorm, input),
            input.contiguous(memory_format=memory_format),
            *(affines if plan.fits else plans.dense_float32(affines)),
            (running, float(momentum), plan, moved),
        )
        if moved:
            # The last kernel did not start: running values are new already.
            a, b, c, d = plain.widened(affines, torch.float32)
            mean, var = moved
            output = plain.normalize(
                input.float(), a, b, c, d, mean, var, *plan.settings
            ).to(input.dtype)
    if output is None:  # nothing has been updated
        return plain.batch_channel_norm(
            *(input, num_groups, running, affines),
            *(momentum, eps, source, update),
        )
    return output


class BatchChannelNorm(torch.autograd.Function):
    """``batch_channel_norm`` of dense activations and float32 affines.

    Formulas and names are those of :class:`.cpu.BatchChannelNorm`. Saves
    input; all else is a few numbers per sample and channel.
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
            tuple[Tensor, Tensor], float, plans.NormPlan, list[Tensor]
        ],
    ) -> Tensor:
        running, momentum, plan, moved = call
        affines = bn_weight, bn_bias, weight, bias
        kept = input.new_empty(plan.kept, dtype=torch.float32)
        output = torch.empty_like(input)
        tensors = input, kept, output, *running, *affines
        before: list[Tensor] | None = None
        if plan.check.pending and plan.check.is_due('forward'):
            before = [values.clone() for values in running]
        try:
            plans.launch(plan.forward, tensors, momentum)
        except CannotLaunch as failure:
            if str(failure) == 'affine':
                moved.extend(plans.used(kept, plan))
                plans.have_moved(running, plan)
            raise
        plans.have_moved(running, plan)
        if before is not None:
            with plans.checking(running, before):
                self_check.norm_forward(
                    plan.check,
                    input,
                    kept,
                    output,
                    before,
                    running,
                    affines,
                    momentum,
                    plan.update,
                    plan.settings,
                )
        ctx.save_for_backward(input, *affines, kept)
        ctx.plan = plan
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # only once, as above
        gradients = None
        if not torch.is_grad_enabled():  # else someone differentiates twice
            gradients = attempt(_batch_channel_norm_backward, ctx, saved, grad)
        if gradients is None:
            input, *affines, kept = saved
            used = plans.used(kept, ctx.plan)
            gradients = plain.gradients(
                lambda x, a, b, c, d: plain.normalize(
                    x.float(), a, b, c, d, *used, *ctx.plan.settings
                ),
                [input, *affines],
                ctx.needs_input_grad[:5],
                grad,
            )
        return *gradients, None


def _batch_channel_norm_backward(
    ctx: Any, saved: tuple[Tensor, ...], grad: Tensor
) -> list[Tensor | None]:
    input, *affines, kept = saved
    plan = ctx.plan
    needs_input = ctx.needs_input_grad[0]
    tensors = plans.backward_tensors(
        plan, grad, input, kept, affines, needs_input
    )
    plans.launch(plan.backward if needs_input else plan.backward[:2], tensors)
    if plan.check.pending and plan.check.is_due('backward'):
        with plans.checking():
            self_check.norm_backward(plan.check, tensors, plan.settings)
    return plans.gradients(tensors)
