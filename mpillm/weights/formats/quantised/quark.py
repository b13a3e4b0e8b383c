"""AMD Quark: FP8, int8, MXFP4, NVFP4, and int4 or uint4 in groups of columns, transposed in words along the rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from mpillm.errors import ModelError
from mpillm.weights.formats.extent import Recipe
from mpillm.weights.formats.quantised.base import Method
from mpillm.weights.formats.quantised.float4 import nvfp4
from mpillm.weights.formats.quantised.float8 import block_of, take_float8
from mpillm.weights.formats.quantised.gptq import Grouped
from mpillm.weights.formats.quantised.integers import Int8
from mpillm.weights.formats.quantised.scales import FLOATS
from mpillm.weights.formats.recipes import Mxfp4, Raw

_WORDS = ("int4", "uint4")


class QuarkMethod(Method):
    """`quark`: X.weight with X.weight_scale, and perhaps X.weight_zero_point or X.weight_scale_2.

    What a matrix is says its type; the configuration says whether words hold int4 or uint4, and in which order.
    """

    def take(self, tensors: dict[str, Raw]) -> Iterator[tuple[str, Recipe]]:
        weights = list(self._weights())
        self._refuse_rotations()
        for name in [name for name in tensors if f"{name}_scale" in tensors]:
            recipe = self._recipe(tensors, name, weights)
            if recipe is not None:
                yield name, recipe
        blocks = [block_of(self, spec["block_size"]) for spec in weights if spec.get("block_size")]
        yield from take_float8(self, tensors, *(blocks or [(128, 128)]))
        self.drop(tensors, ".weight_zero_point", ".input_zero_point", ".output_zero_point", ".input_scale_2")

    def _recipe(self, tensors: dict[str, Raw], name: str, weights: list[Mapping[str, Any]]) -> Recipe | None:
        """Return the recipe of a matrix, whose tensors are removed from the others; None for floats and FP8."""
        values = tensors[name]
        if len(values.shape) != 2 or values.dtype not in ("I8", "I32", "U8"):
            return None
        scales = tensors.pop(f"{name}_scale")
        del tensors[name]
        if values.dtype == "I8":
            self.check(scales, FLOATS, values.shape[:1], (values.shape[0], 1), (1,), ())
            return Int8(values, scales)
        if values.dtype == "I32":
            zeros = tensors.pop(f"{name}_zero_point", None)
            return self._words(values, scales, zeros, weights)
        whole = tensors.pop(f"{name}_scale_2", None)
        if whole is not None:
            return nvfp4(self, values, scales, whole, divides=False)
        rows, half = values.shape
        self.check(scales, ("U8",), (rows, half // 16))
        return Mxfp4(replace(values, shape=(rows, half // 16, 16)), scales)

    def _words(self, q: Raw, scales: Raw, zeros: Raw | None, weights: list[Mapping[str, Any]]) -> Recipe:
        """W of words [columns, rows / 8] with scales and zeros of each group of columns."""
        columns, words = q.shape
        count = scales.shape[0] if scales.shape else 0
        self.check(scales, FLOATS, (count, 8 * words))
        self.groups_of(columns, count, scales)
        if zeros is not None:
            self.check(zeros, ("I32",), (count, words))
        kinds = {str(spec.get("dtype")) for spec in weights} & set(_WORDS)
        if len(kinds) != 1:
            raise ModelError(
                f"{self.path}: {q.name} holds int4 or uint4, and the configuration does not say which."
            )
        signed = kinds == {"int4"}
        if not signed and zeros is None:
            raise ModelError(f"{self.path} has no tensor {q.name}_zero_point; the model is not complete.")
        export = self.config.get("export")
        method = export.get("pack_method") if isinstance(export, Mapping) else None
        if method not in (None, "reorder", "order"):
            raise ModelError(f"{self.path}: pack_method {str(method)[:40]!r} of quark is not supported.")
        symmetric = zeros is None or all(spec.get("symmetric") is True for spec in weights)
        return Grouped(
            "Quark",
            4,
            q,
            zeros,
            scales,
            False,
            symmetric,
            None,
            True,
            in_order=method == "order",
            signed=signed,
        )

    def _weights(self) -> Iterator[Mapping[str, Any]]:
        """Yield the configuration of the weights: of all, of layers, and of kinds of layers."""
        tables = [self.config.get("global_quant_config")]
        for key in ("layer_quant_config", "layer_type_quant_config"):
            layers = self.config.get(key)
            tables += layers.values() if isinstance(layers, Mapping) else ()
        for table in tables:
            weight = table.get("weight") if isinstance(table, Mapping) else None
            specs = weight if isinstance(weight, list) else [weight]
            if specs[1:] and {str(spec.get("dtype")) for spec in specs if isinstance(spec, Mapping)} & set(
                _WORDS
            ):
                raise ModelError(f"{self.path}: int4 numbers of FP8 ones are not supported.")
            yield from (spec for spec in specs if isinstance(spec, Mapping))

    def _refuse_rotations(self) -> None:
        """Raise ModelError if activations are rotated while the model runs."""
        algorithms = self.config.get("algo_config")
        for algorithm in algorithms if isinstance(algorithms, list) else [algorithms]:
            if isinstance(algorithm, Mapping) and any(
                value is True and key.startswith("online") for key, value in algorithm.items()
            ):
                raise ModelError(
                    f"{self.path}: activations that are rotated (algo_config) are not supported."
                )
