"""From a model to verified files of several sequence lengths, in one call."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise, product
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from torchopt_passes.deploy.artifact import Artifact
from torchopt_passes.deploy.base import Target, target_types
from torchopt_passes.deploy.buckets import MANIFEST, Buckets, Padding, cut, length_of, padded, write_manifest
from torchopt_passes.deploy.calls import batch_size, cause_of, example_call, named_inputs, resize_batch, run_source
from torchopt_passes.deploy.export import export
from torchopt_passes.deploy.files import staged_folder
from torchopt_passes.deploy.program import precision_of
from torchopt_passes.deploy.quantized import quantized
from torchopt_passes.deploy.verify import compare_with_source
from torchopt_passes.errors import ConfigError, VerificationError
from torchopt_passes.graph.inference import LOSS
from torchopt_passes.graph.verify import relative_error

__all__ = ["export_buckets"]

Call = dict[str, Any]


def export_buckets(
    module: nn.Module,
    folder: str | Path,
    target: str | Target,
    *,
    lengths: Sequence[int],
    pad: Mapping[str, float],
    batches: Sequence[int] = (),
    example_inputs: Any = None,
    verify_inputs: Sequence[Any] = (),
    tolerance: float | None = None,
    quantization: Literal["int8"] | None = None,
    calibration: Iterable[Any] | None = None,
    **options: Any,
) -> Buckets:
    """Write a model to one file for each sequence length; calls of any length are padded to the next one.

    For runtimes that take fixed sizes, or are faster with them. It is proven that padding changes nothing: the model
    itself, padded and unpadded, and then each file, at the shortest and the longest sequence of its bucket and at
    several batches, against the model unpadded. Sequences are filled up on the right.

    Args:
        module: an ``nn.Module``, a captured graph, or a graph converted to int8; left as it was.
        folder: to write; one that `export_buckets` wrote before is replaced. Its parent must exist.
        target: as for `export`.
        lengths: of the buckets, in tokens: dim 1 of the padded inputs.
        pad: the inputs that have that length, and what each is filled up with: 0 for an attention mask, the
            tokenizer's ``pad_token_id`` for ids.
        batches: batch sizes, a file for each and each length, filled up by repeating rows; by default the batch is
            open, or that of the example where the runtime fixes it.
        example_inputs: a call of the module, of any length; a captured graph remembers its own.
        verify_inputs: more calls to compare on, such as real data, of any length.
        tolerance: the largest error allowed, as for `export`.
        quantization: as for `export`; the model is quantized once, for all buckets.
        calibration: as for `export`.
        **options: any other argument of `export`, and options of the target.

    Returns:
        The buckets, loaded.

    Raises:
        ConfigError: wrong options, inputs without a padding value, or a model that does not run at a length.
        ExportError: as `export`, or the folder is there and not one of ours. Nothing is left.
        VerificationError: the model does not mask its padding; names the output and the inputs it comes through. Or a
            file does not compute what the module computes. Nothing is left.

    Example:
        >>> buckets = export_buckets(  # doctest: +SKIP
        ...     model, "bert", "litert", lengths=(32, 64), pad={"input_ids": 0, "attention_mask": 0}
        ... )
        >>> buckets(**tokenizer("any length up to 64", return_tensors="pt"))  # doctest: +SKIP
    """
    folder = Path(folder)
    suffix = _suffix(target)
    lengths, batches = _sizes("lengths", lengths, 2), _sizes("batches", batches, 1) if batches else ()
    if wrong := sorted({"dynamic", "metric", "metric_drop", "verify"} & set(options)):
        raise ConfigError(f"export_buckets has no {wrong[0]}: sizes are those of the buckets, and it always verifies")
    if quantization is not None:
        name = target.name if isinstance(target, Target) else target
        module = quantized(module, name, quantization, example_inputs, calibration)
    elif calibration is not None:
        options["calibration"] = [*calibration]
    example = named_inputs(module, example_call(module, example_inputs))
    _check_pad(module, example, pad)
    source = _Source(module, options.get("outputs"))
    padding = _prove_masked(source, example, pad, lengths, tolerance)
    with staged_folder(folder, MANIFEST) as draft:
        artifacts: list[Artifact] = []
        for batch in batches or (0,):
            for length in lengths:
                call = _resized(example, pad, length, batch)
                path = draft / f"{f'{batch}x' if batch else ''}{length}{suffix}"
                sizes: Any = False if batch else "batch"
                artifacts.append(
                    export(module, path, target, example_inputs=call, dynamic=sizes, tolerance=tolerance, **options)
                )
        buckets = Buckets(artifacts, padding)
        calls = [_resized(example, pad, *size) for size in _probes(buckets.sizes)]
        figures = buckets.verify(module, *calls, *verify_inputs, tolerance=tolerance)
        buckets.verification = {name: float(value) for name, value in vars(figures).items()}
        write_manifest(buckets)
    for artifact in artifacts:
        artifact.path = folder / artifact.path.name
    return buckets


def _suffix(target: str | Target) -> str:
    if isinstance(target, Target):
        return target.suffix
    types = target_types()
    if target not in types:
        raise ConfigError(f"no target {target!r}; there are {list(types)}")
    return types[target].suffix


def _sizes(name: str, sizes: Sequence[int], least: int) -> tuple[int, ...]:
    found = tuple(sorted(set(sizes)))
    if not found or any(type(size) is not int or size < least for size in found):
        raise ConfigError(f"{name}: whole numbers of at least {least} are wanted, not {sizes!r}")
    return found


def _check_pad(module: nn.Module, example: Mapping[str, Any], pad: Mapping[str, float]) -> None:
    given = {name: value for name, value in example.items() if isinstance(value, torch.Tensor)}
    unknown = sorted(set(pad) - set(given))
    if unknown or not pad:
        raise ConfigError(
            f"pad: {f'no input {unknown[0]!r}' if unknown else 'empty'}: name the inputs of {type(module).__name__} "
            f"that are as long as the sequence, of {sorted(given)}, each with its padding value"
        )
    for name, number in pad.items():
        if type(number) not in ((int, float) if given[name].is_floating_point() else (int,)):
            raise ConfigError(
                f"pad: {name!r} is filled up with a number of its dtype {given[name].dtype}, not {number!r}; for ids "
                "of a tokenizer without a padding token any token will do, such as eos_token_id"
            )
    length_of(given, pad)


def _resized(example: Call, pad: Mapping[str, float], length: int, batch: int = 0) -> Call:
    """Return the example at another length, by repeating or dropping columns, and at a batch if one is given."""
    found = dict(example)
    for name in pad:
        columns = torch.arange(length, device=found[name].device) % found[name].shape[1]
        found[name] = found[name][:, columns]
    return resize_batch(((), found), batch)[1] if batch else found


def _probes(sizes: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return (length, batch) of calls that fill the buckets of (batch, length) as little as can be, and wholly."""
    batches, lengths = (sorted(set(column)) for column in zip(*sizes, strict=True))
    rows = [n for fewer, batch in pairwise((0, *batches)) for n in ((fewer + 1, batch) if batch else (1, 3))]
    columns = [n for shorter, length in pairwise((1, *lengths)) for n in (shorter + 1, length)]
    return sorted(set(product(columns, rows)))


class _Source:
    """The model as a function of a call, for the outputs that are kept."""

    def __init__(self, module: nn.Module, outputs: Sequence[str] | None) -> None:
        self.module = module
        self.outputs = outputs

    def __call__(self, call: Call) -> dict[str, torch.Tensor]:
        try:
            results = run_source(self.module, ((), call))
        except Exception as error:
            shapes = {name: tuple(value.shape) for name, value in call.items() if isinstance(value, torch.Tensor)}
            raise ConfigError(
                f"{type(self.module).__name__} does not run at {shapes}: {cause_of(error)}. Give shorter lengths=, and "
                "in pad= every input that is as long as the sequence"
            ) from error
        return {name: value for name, value in results.items() if self._keeps(name)}

    def _keeps(self, name: str) -> bool:
        if self.outputs is None:
            return name != LOSS
        return any(name == kept or name.startswith(f"{kept}_") for kept in self.outputs)


def _prove_masked(
    source: _Source, example: Call, pad: Mapping[str, float], lengths: Sequence[int], tolerance: float | None
) -> Padding:
    """Check that the model computes the same with and without padding; return how its outputs follow its inputs."""
    long, rows = max(lengths[-1], 3), batch_size(((), example)) or 1
    one, longer = source(_resized(example, pad, 2)), source(_resized(example, pad, long))
    more = source(_resized(example, pad, 2, rows + 1))
    padding = Padding(
        values=dict(pad),
        sequences=_following(one, longer, (2, long), "length"),
        batches=_following(one, more, (rows, rows + 1), "batch"),
    )
    precision = precision_of(source.module)
    for shorter, length in pairwise((1, *lengths)):
        call = _resized(example, pad, shorter + 1)
        filled = padded(call, padding, length, rows)
        found = cut(source(filled), padding, shorter + 1, rows)
        for name, value in found.items():
            result = compare_with_source(
                [[value]], source.module, [((), call)], [name], precision=precision, tolerance=tolerance
            )
            if not result.passed:
                raise VerificationError(
                    f"{type(source.module).__name__} does not mask its padding: output {name!r} of {shorter + 1} "
                    f"tokens is another one when they are padded to {length}: {result}. It comes through "
                    f"{_leaks(source, name, call, filled, padding) or list(pad)}: give the model its attention mask, "
                    "and in pad= the values it ignores. Nothing was written"
                )
    return padding


def _following(
    few: dict[str, torch.Tensor], many: dict[str, torch.Tensor], sizes: tuple[int, int], what: str
) -> dict[str, tuple[int, ...]]:
    """Return the dims of each output that are as large as the inputs are, from two runs."""
    found: dict[str, tuple[int, ...]] = {}
    for name, value in few.items():
        pairs = list(zip(value.shape, many[name].shape, strict=True))
        found[name] = tuple(dim for dim, pair in enumerate(pairs) if pair[0] != pair[1])
        if strange := [pairs[dim] for dim in found[name] if pairs[dim] != sizes]:
            raise ConfigError(
                f"output {name!r} has size {strange[0][0]} at {what} {sizes[0]} and {strange[0][1]} at {sizes[1]}: "
                "what is neither fixed nor as long as the inputs cannot be cut back; leave it out by outputs="
            )
    return found


def _leaks(source: _Source, output: str, call: Call, filled: Call, padding: Padding) -> list[str]:
    """Return the inputs whose padding an output depends on."""
    length = length_of(call, padding.values)
    still = source(filled)[output]
    found: list[str] = []
    for name in padding.values:
        columns = torch.arange(filled[name].shape[1], device=filled[name].device) % length
        moved = source(filled | {name: filled[name][:, columns]})[output]
        if relative_error(moved, still) > 0:
            found.append(name)
    return found
