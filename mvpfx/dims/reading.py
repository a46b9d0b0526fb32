"""The values and steps of a region: what its graph's nodes read and make."""

from __future__ import annotations

import operator
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from mvpfx.dims.attending import may_mask
from mvpfx.dims.channel_norm import GroupNorm
from mvpfx.dims.find_rule import find_rule
from mvpfx.dims.projected_attention import find_projected
from mvpfx.dims.rearrangement import NAMES, sources
from mvpfx.dims.rule import Opaque, Rule, Step, replaced
from mvpfx.dims.value import Known, Value
from mvpfx.layer import Obstacle
from mvpfx.matmul_table import ATTENTIONS
from mvpfx.nodes import name_of, writes_shared
from mvpfx.program import Program, full_name
from mvpfx.swap import original_class
from mvpfx.torch_private import size_hint

OUTSIDE = "they come from outside of the region"
RESULT = "they are part of the region's result"
RETURNED = "they are returned, and without example inputs it is not known that nothing reads them"
VARIES = "their number varies from call to call"
_STATISTICS = ("weight", "bias", "running_mean", "running_var")
_BIASED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Layers that can be given a bias."""
_PER_CHANNEL = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.PReLU)  # pyright: ignore[reportPrivateUsage]
"""Layers with parameters per channel."""


class Reading:
    """One region's graph, read.

    Args:
        program, region: what is read.
        obstacle: parameter name -> why its shape may not change, or None.

    Attributes:
        steps: in graph order, each with its rule.
        values: what each node makes: a value, or a tuple of them.
        parameters: full name -> value.
        results: what the region returns.
    """

    def __init__(self, program: Program, region: str, obstacle: Obstacle) -> None:
        self.program, self.region, self.obstacle = program, region, obstacle
        self.graph = program.graphs[region]
        self.values: dict[fx.Node, Any] = {}
        self.numbers: dict[fx.Node, Any] = {}
        self.parameters: dict[str, Value] = {}
        self.steps: list[tuple[Step, Rule]] = []
        self.results: list[Value] = []
        self.order = {node: i for i, node in enumerate(self.graph.nodes)}
        for node in self.graph.nodes:
            self._read(node)

    def _read(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            self._tensor(node, node.meta.get("val"), OUTSIDE)
        elif node.op == "get_attr":
            self._attribute(node)
        elif node.op == "output":
            for argument in node.all_input_nodes:
                made = self.values.get(argument)
                for value in made if isinstance(made, tuple) else (made,):
                    if isinstance(value, Value):
                        value.need(~value.needed)
                        value.fixed = [RESULT] * len(value.shape)
                        self.results.append(value)
        elif self._is_item(node):
            pass  # made with the tuple it is taken from
        else:
            self._call(node)

    def _is_item(self, node: fx.Node) -> bool:
        source: Any = node.args[0] if node.args else None
        return node.target is operator.getitem and isinstance(self.values.get(source), tuple)

    def _tensor(self, node: fx.Node, fake: Any, fixed: str | None = None) -> Value | None:
        if not isinstance(fake, Tensor):
            return None
        value = Value.of(node.name, tuple(size_hint(size) for size in fake.shape))
        value.fixed = [fixed or _varies(size) for size in fake.shape]
        value.varies = tuple(_is_symbolic(size) for size in fake.shape)
        self.values[node] = value
        return value

    def _attribute(self, node: fx.Node) -> None:
        if "constant" in node.meta:
            constant: Tensor = node.meta["constant"]
            value = Value.of(node.name, tuple(constant.shape), Known.all(constant.detach().cpu()))
            value.fixed = [OUTSIDE] * constant.dim()
            self.values[node] = value
            return
        value = self._parameter(full_name(self.region, node.target))
        if value is not None:
            self.values[node] = value

    def _parameter(self, name: str) -> Value | None:
        if name not in self.parameters:
            tensor = self.program.parameter(name)
            if tensor is None:
                return None
            value = Value.of(name, tuple(tensor.shape), Known.all(tensor.detach().cpu()))
            reason = self.obstacle(name)
            value.fixed = [reason] * tensor.dim()
            value.follows = True
            self.parameters[name] = value
        return self.parameters[name]

    def _call(self, node: fx.Node) -> None:
        values: dict[fx.Node, Value] = {}
        numbers: dict[fx.Node, Any] = {}
        for argument in node.all_input_nodes:
            made = self.values.get(argument)
            if isinstance(made, Value):
                values[argument] = made
            elif argument in self.numbers:
                numbers[argument] = self.numbers[argument]
        outputs = self._outputs(node)
        if not outputs:
            number = self._number(node, values, numbers)
            if number is not None:
                self.numbers[node] = number
                return
        module = None
        if node.op == "call_module":
            module = self.program.module(full_name(self.region, node.target))
        step = Step(node, name_of(node), module, outputs, values, {}, numbers)
        if isinstance(self.values.get(node), tuple) and step.name in NAMES:
            step.outputs = self._all_parts(step)
        step.extra = self._further(step)
        self.steps.append((step, self._rule(step)))

    def _further(self, step: Step) -> dict[str, Value]:
        """What a step reads besides tensors: whole tuples, statistics of the module it calls."""
        found: dict[str, Value] = {}
        for argument in step.node.all_input_nodes:
            made = self.values.get(argument)
            parts: tuple[Value | None, ...] = made if isinstance(made, tuple) else ()
            found |= {f"{argument.name}.{i}": v for i, v in enumerate(parts) if v is not None}
        if isinstance(step.module, _PER_CHANNEL):
            for name in _STATISTICS:
                value = self._parameter(full_name(self.region, f"{step.node.target}.{name}"))
                if value is not None:
                    found[name] = value
        if isinstance(step.module, nn.Embedding):
            table = self._parameter(full_name(self.region, f"{step.node.target}.weight"))
            found |= {} if table is None else {"weight": table}
        return found

    def _outputs(self, node: fx.Node) -> tuple[Value, ...]:
        value = self._tensor(node, node.meta.get("val"))
        if value is not None:
            return (value,)
        items = [u for u in node.users if u.target is operator.getitem and u.args[0] is node]
        made: dict[int, Value] = {}
        for item in items:
            found = self._tensor(item, item.meta.get("val"))
            if found is not None:
                made[cast("int", item.args[1])] = found
        if not made:
            return ()
        self.values[node] = tuple(made.get(i) for i in range(max(made) + 1))
        return tuple(v for v in self.values[node] if v is not None)

    def _all_parts(self, step: Step) -> tuple[Value, ...]:
        """The parts a tensor is split into, those that nobody reads too."""
        made = self.values[step.node]
        first = step.outputs[0]
        parts: list[Value] = []
        for i, numbers in enumerate(sources(step)):
            part = made[i] if i < len(made) else None
            if part is None:
                part = Value.of(f"{step.node.name}.{i}", tuple(numbers.shape))
                part.fixed = list(first.fixed)
            parts.append(part)
        self.values[step.node] = tuple(parts)
        return tuple(parts)

    def _number(self, node: fx.Node, values: dict[fx.Node, Value], numbers: Any) -> Any:
        """What a node that computes a size was in the recorded call."""
        if node.op == "call_method" and node.target == "size" and values:
            shape = next(iter(values.values())).shape
            dim: Any = node.args[1] if len(node.args) > 1 else slice(None)
            return shape[dim]
        if node.op == "call_function" and numbers and not values:
            target: Any = node.target
            return target(*replaced(node.args, numbers.get))
        return None

    def _rule(self, step: Step) -> Rule:
        step.attends = not may_mask(self.program, self.region, step)
        if writes_shared(step.node, step.module, self.order, NAMES):
            return Opaque(f"{step.name} changes a tensor that is read elsewhere")
        if step.node.target in ATTENTIONS:
            owner = full_name(self.region, step.node.meta.get("module", "")).rstrip(".")
            return find_projected(step, self.program.module(owner), owner, self._can_fold(step))
        rule = find_rule(step, self._can_fold(step))
        if isinstance(rule, GroupNorm) and step.module is not None:
            shared = self.obstacle(full_name(self.region, step.node.target))
            return rule if shared is None else Opaque(shared)
        return rule

    def _can_fold(self, step: Step) -> bool:
        """Whether a bias read here alone can take constants, or be created."""
        read = [node for node in step.values if node.op == "get_attr"]
        names = [full_name(self.region, node.target) for node in read]
        if any(len(node.users) > 1 for node in read) or any(map(self.obstacle, names)):
            return False
        if step.node.target in ATTENTIONS:
            return True
        if len(step.inputs) == 3:
            return len(read) == 2
        owner = full_name(self.region, step.node.meta.get("module", ""))
        module = self.program.module(owner)
        if full_name(owner, "weight") not in names or not isinstance(module, _BIASED):
            return False
        plain = original_class(module).forward in [kind.forward for kind in _BIASED]
        return plain and module._parameters.get("bias") is None


def _is_symbolic(size: Any) -> bool:
    """Whether a size depends on the call."""
    return isinstance(size, torch.SymInt) and not size.node.expr.is_number


def _varies(size: Any) -> str | None:
    """Why a dimension has no size of its own; None where it has, or holds a fixed factor."""
    if not isinstance(size, torch.SymInt):
        return None
    expression = size.node.expr
    whole = expression.is_Mul and any(part.is_Integer for part in expression.args)
    return None if expression.is_number or whole else VARIES
