"""Recipe: how a model is quantized. One method or a chain (`smoothquant+gptq`), looked up by file name.

A method is a frozen pydantic dataclass in `methods/`; its fields are its options. It declares what it claims (the
sites of the scheme that it quantizes) and at which stage it runs. Steps run by stage, whatever the order in which a
chain is written:

    TRANSFORM    changes the model without changing its function (smoothing, rotation); claims no site
    WEIGHTS      one base solver per recipe quantizes linear layers one by one
    ACTIVATIONS  provides quantizers at linear inputs, queries, probabilities
    CACHE        provides the KV cache

A method that does several of these inherits from several of the classes below: its claims are the union of theirs, and
it stands in a chain where its first stage does. Sites that the scheme quantizes and nothing claims are rounded to
nearest (`qfarm.layers.rtn`).

Third parties add methods through the entry-point group `qfarm.methods` (name = method name, value = module).
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import importlib
import importlib.metadata
import pkgutil
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeGuard

import pydantic

from qfarm.errors import InvalidInput, nearest

if TYPE_CHECKING:
    import torch

    from qfarm.inputs import InputStatistics, Statistic
    from qfarm.layers.inject import MakeLayer
    from qfarm.layers.rtn import Quantizer
    from qfarm.layers.sites import Observed, Place
    from qfarm.models.load import LoadedModel
    from qfarm.quantized import QuantizedWeight
    from qfarm.quantizer import Grid
    from qfarm.scheme import Scheme
    from qfarm.solver import ColumnGrid
    from qfarm.walk import BlockProblem

# Every method's dataclass: `@dataclass(frozen=True, kw_only=True, config=STRICT)`.
STRICT = pydantic.ConfigDict(extra="forbid", strict=True)


class Stage(enum.IntEnum):
    TRANSFORM = 0
    WEIGHTS = 1
    ACTIVATIONS = 2
    CACHE = 3


class Method:
    """Base of all methods. Subclasses are frozen pydantic dataclasses whose fields are the options."""

    version: ClassVar[int] = 1  # raise it when a fix changes results: it enters the cell's identity
    source: ClassVar[str]  # paper or code that defines the method
    stage: ClassVar[Stage]
    claims: ClassVar[frozenset[str]] = frozenset()
    optional: ClassVar[frozenset[str]] = frozenset()  # claimed sites that a scheme may leave at 16 bits
    yields: ClassVar[frozenset[str]] = frozenset()  # claimed sites that it leaves to another method of the chain
    widths: ClassVar[range] = range(2, 9)  # weight widths that a weight solver supports, in bits
    site_widths: ClassVar[Mapping[str, range]] = {}  # the same for other sites that are claimed; default: those of RTN
    # Options that came after the first stored results: they enter the identity only when they are not at their default.
    later: ClassVar[frozenset[str]] = frozenset()

    @property
    def name(self) -> str:
        return type(self).__module__.rsplit(".", 1)[-1]

    def __init_subclass__(cls, **keywords: Any) -> None:
        """Claims are the union of those of the bases and the stage their first, unless the class says otherwise."""
        super().__init_subclass__(**keywords)
        bases = [base for base in cls.__bases__ if issubclass(base, Method) and base is not Method]
        if bases and "claims" not in vars(cls):
            cls.claims = frozenset().union(*(base.claims for base in bases))
        if bases and "stage" not in vars(cls):
            cls.stage = min(base.stage for base in bases)

    def statistics(self) -> frozenset[Statistic]:
        """What the method needs to know of inputs: of the layers that it solves, of the sites that it quantizes."""
        return frozenset()

    @property
    def cell_version(self) -> int:
        """The version of what these options compute; more than `version` where a fix changed their results alone."""
        return self.version

    @property
    def needs_text(self) -> bool:
        """True if calibration text is read; then calibration and seed enter the cell's identity."""
        return bool(self.statistics())

    @property
    def needs_seed(self) -> bool:
        """True if the method draws random numbers of its own."""
        return False

    def resolve(self, group_size: int) -> Self:
        """The same method with every 'automatic' option replaced by what it means for this cell."""
        return self

    def refusal(self, group_size: int, symmetric: bool) -> str | None:
        """The rule that forbids this cell, or None. Called before anything is loaded."""
        return None

    def recipe_refusal(self, recipe: Recipe) -> str | None:
        """The rule that forbids this chain, or None."""
        return None

    def packed_refusal(self) -> str | None:
        """Why the weights that it makes cannot be multiplied packed (`qfarm.layers.products`), or None."""
        return None

    def model_refusal(self, config: Mapping[str, Any]) -> str | None:
        """The rule that forbids this model, given its configuration, or None."""
        return None

    def options(self) -> dict[str, Any]:
        """All options with their values, defaults included."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # type: ignore[arg-type]

    def identity(self) -> dict[str, Any]:
        """The options that make up the identity: all but those of `later` that are at their default."""
        usual = type(self)().options() if self.later else {}
        return {k: value for k, value in self.options().items() if k not in self.later or value != usual[k]}


class WeightSolver(Method):
    """Quantizes one linear layer at a time; the walker (qfarm.calibrate) feeds it.

    A solver that treats output rows independently is stackable: layers that share an input are handed to it as one
    matrix.
    """

    stage = Stage.WEIGHTS
    claims = frozenset({"weight"})
    joint: ClassVar[bool] = False  # layers that share an input are solved as one matrix though rows are not independent
    divides_inputs: ClassVar[bool] = False  # by factors of its own, before they are quantized
    takes_grids: ClassVar[bool] = False  # works on grids of a GridProvider, `qfarm.solver.ColumnGrid`

    @property
    def stackable(self) -> bool:
        """Whether rows are independent, so that several layers may be solved as one matrix."""
        return True

    def statistics(self) -> frozenset[Statistic]:
        """What `quantize_linear` needs to know of the layer's inputs."""
        return frozenset()

    def symmetric_weights(self, asked: bool) -> bool:
        """Whether its weights are symmetric where the job asks for that or not; some methods do not read its key."""
        return asked

    def layer_refusal(self, rows: int, columns: int, bits: int, group_size: int, scale_bytes: int) -> str | None:
        """The rule that forbids a layer of that shape, or None. `scale_bytes` is what a stored scale takes."""
        return None

    @property
    def true_sequential(self) -> bool:
        """True: inside a block, layers see inputs that earlier layers of the block have already quantized."""
        return False

    @property
    def original_inputs(self) -> bool:
        """True: it always learns from the original model's inputs, as with `statistics: independent`."""
        return False

    def quantize_linear(self, weight: torch.Tensor, inputs: InputStatistics | None, grid: Grid) -> QuantizedWeight:
        """Quantize weight [out, in], float32. `inputs` is None when `statistics()` is empty."""
        raise NotImplementedError


class BlockSolver(WeightSolver):
    """Quantizes the layers of a decoder block together, by gradient or otherwise."""

    @property
    def whole_blocks(self) -> bool:
        """False: this cell's options need no more than `quantize_linear`, and blocks are not handed over."""
        return True

    @property
    def needs_text(self) -> bool:
        return True

    def quantize_block(self, problem: BlockProblem) -> dict[str, QuantizedWeight]:
        """A quantized weight for each role of `problem.linears`."""
        raise NotImplementedError


class GridProvider(WeightSolver):
    """A weight solver that, beside another one in a chain, gives that one its grid instead."""

    def provide(self, grid: Grid, role: str = "", head_dim: int = 0) -> ColumnGrid:
        """The method's own grid where a solver is asked for `grid`; role of the layer, if known, and width of a head.

        What is provided may be handed back as `grid`, and is then returned as it is or as an equal one.
        """
        raise NotImplementedError


class Wrapper(Method):
    """Adds a term to whatever a weight solver made, layer by layer."""

    stage = Stage.WEIGHTS
    claims = frozenset({"weight"})

    def wrap(self, weight: torch.Tensor, quantized: QuantizedWeight, inputs: InputStatistics | None) -> QuantizedWeight:
        """weight [out, in] float32 is the original one. `inputs` is None when `statistics()` is empty."""
        raise NotImplementedError


class Transform(Method):
    """Changes the model without changing its function, before its weights are quantized."""

    stage = Stage.TRANSFORM
    learns_from: ClassVar[frozenset[str]] = frozenset({"linear_in"})  # sites of which `transform_statistics()` speaks
    prepared: ClassVar[str] = ""  # what `prepare` does, for telling statistics apart; empty: nothing

    def transform_statistics(self) -> frozenset[Statistic]:
        """What `transform` needs to know; a method that also solves weights may need less there."""
        return self.statistics()

    def prepare(self, loaded: LoadedModel) -> None:
        """Change the model for as long as it is observed, through `loaded`."""

    def transform(self, loaded: LoadedModel, observed: Observed, seed: int) -> list[str]:
        """Change parameters through `loaded`, which puts them back; what was done or left out, for the attempt's notes.

        `observed` holds what `transform_statistics()` asks for at the sites of `learns_from`, in the model as it stands
        and as `prepare` made it: the original one for the first transform of a chain. In float32 the logits stay equal
        within 1e-4.
        """
        raise NotImplementedError

    def learn(
        self, loaded: LoadedModel, observed: Observed, seed: int, windows: torch.Tensor | None, scheme: Scheme
    ) -> list[str]:
        """The same for transforms that read the calibration text themselves, or look at what will be quantized.

        windows [samples, length] are token ids; None where the recipe needs no text.
        """
        return self.transform(loaded, observed, seed)


class ActivationMethod(Method):
    """Provides quantizers of activations."""

    stage = Stage.ACTIVATIONS
    claims = frozenset({"linear_in"})
    observes: ClassVar[frozenset[str]] = frozenset({"linear_in"})  # sites of which `site_statistics()` speaks
    heads_apart: ClassVar[bool] = False  # its quantizers see each head of the input of o as a row

    def site_statistics(self) -> frozenset[Statistic]:
        """What `quantizer` needs to know of these sites; a method that also solves weights may need less here."""
        return self.statistics()

    @property
    def causal(self) -> bool:
        """False if a quantizer looks across tokens: then prefill and decoding differ, and cells are marked."""
        return True

    def quantizer(self, place: Place, bits: int, observed: Observed) -> Quantizer | None:
        """A function of a tensor that holds no state, or None to leave this place at 16 bits.

        Where those of layers that read one input are equal (and hashable), one does the work for all.
        `place` is one of the claimed sites; who claims kv_cache is asked for k_pre_rope, k and v, the last two of
        which are quantized when they are written to the cache. `observed` is of the model after all transforms.
        """
        raise NotImplementedError

    def report(self, quantizers: Mapping[Place, Quantizer]) -> list[str]:
        """What its installed quantizers saw, for the attempt's notes; asked after all evaluations."""
        return []


class CacheMethod(Method):
    """Provides the layers of a quantized KV cache."""

    stage = Stage.CACHE
    claims = frozenset({"kv_cache"})
    observes: ClassVar[frozenset[str]] = frozenset()  # sites of which `site_statistics()` speaks

    def site_statistics(self) -> frozenset[Statistic]:
        """What `cache_layer` needs to know of these sites; a method that also solves weights may need less here."""
        return self.statistics()

    @property
    def causal(self) -> bool:
        """False if what is stored of a token depends on later tokens other than by the residual's length."""
        return True

    def cache_layer(self, block: int, bits: int, observed: Observed) -> MakeLayer:
        """What makes an empty cache layer of this block; it is called for every new cache."""
        raise NotImplementedError


def solves_blocks(solver: WeightSolver | None) -> TypeGuard[BlockSolver]:
    """Whether the solver is handed whole blocks."""
    return isinstance(solver, BlockSolver) and solver.whole_blocks


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Methods in the order of their stages. The empty recipe is the full-precision baseline."""

    methods: tuple[Method, ...] = ()

    @property
    def name(self) -> str:
        return "+".join(method.name for method in self.methods) or "baseline"

    @property
    def solver(self) -> WeightSolver | None:
        """The base weight solver, if the recipe has one; a grid provider is it where it stands alone."""
        solvers = [method for method in self.methods if isinstance(method, WeightSolver)]
        return next((s for s in solvers if not isinstance(s, GridProvider)), solvers[0] if solvers else None)

    def grid(self, grid: Grid, role: str = "", head_dim: int = 0) -> Grid:
        """The grid that the weight solver is given for a layer of that role: a provider's where there is one."""
        provider = next((method for method in self.methods if isinstance(method, GridProvider)), None)
        return grid if provider is None else provider.provide(grid, role, head_dim)

    def claimant(self, site: str) -> Method | None:
        """The method that quantizes a site other than the weights; None: round to nearest."""
        claiming = [method for method in self.methods if site in method.claims]
        return next((method for method in claiming if site not in method.yields), claiming[0] if claiming else None)

    @property
    def wrappers(self) -> tuple[Wrapper, ...]:
        """Terms on top of the weight solver, in the order in which they stand in the chain."""
        return tuple(method for method in self.methods if isinstance(method, Wrapper))

    @property
    def input_statistics(self) -> frozenset[Statistic]:
        """What the weight solver and the terms on top of it need to know of a layer's inputs."""
        asking = [method for method in self.methods if isinstance(method, WeightSolver | Wrapper)]
        return frozenset().union(*(method.statistics() for method in asking))

    @property
    def transforms(self) -> tuple[Transform, ...]:
        return tuple(method for method in self.methods if isinstance(method, Transform))

    @property
    def site_methods(self) -> tuple[ActivationMethod | CacheMethod, ...]:
        """Methods that quantize something beside the weights."""
        return tuple(method for method in self.methods if isinstance(method, ActivationMethod | CacheMethod))

    @property
    def claims(self) -> frozenset[str]:
        return frozenset().union(*(method.claims for method in self.methods))

    @property
    def needs_text(self) -> bool:
        return any(method.needs_text for method in self.methods)

    @property
    def needs_seed(self) -> bool:
        return self.needs_text or any(method.needs_seed for method in self.methods)

    def specs(self) -> list[dict[str, Any]]:
        """Plain data from which `from_specs` rebuilds the recipe in another process."""
        return [{"name": m.name, "version": m.cell_version, "options": m.identity()} for m in self.methods]

    @staticmethod
    def from_specs(specs: Sequence[Mapping[str, Any]]) -> Recipe:
        """Raises InvalidInput when this code's version of a method is not the one that was planned."""
        methods = tuple(build_method(spec["name"], spec["options"]) for spec in specs)
        for method, spec in zip(methods, specs, strict=True):
            if method.cell_version != spec["version"]:
                raise InvalidInput(f"{method.name}: version {method.cell_version} here, {spec['version']} in the plan")
        return Recipe(methods)


def method_names() -> list[str]:
    """Names of all methods: files of `methods/` and entry points. Imports nothing."""
    _modules.cache_clear()
    return sorted(_modules())


@functools.cache  # for it is asked for every cell of a plan, and reads the metadata of every installed package
def _modules() -> dict[str, list[str]]:
    """The modules that offer each method: one, unless packages clash."""
    import qfarm.methods

    own = [(info.name, f"qfarm.methods.{info.name}") for info in pkgutil.iter_modules(qfarm.methods.__path__)]
    points = importlib.metadata.entry_points(group="qfarm.methods")
    found: dict[str, dict[str, None]] = {}
    for name, module in (*own, *((point.name, point.module) for point in points)):
        found.setdefault(name, {})[module] = None  # a package that is found twice offers it once
    return {name: list(modules) for name, modules in found.items()}


def lookup(name: str) -> type[Method]:
    """The method class of that name. Raises InvalidInput for a name that nothing offers, or more than one package."""
    if name not in (modules := _modules()):
        _modules.cache_clear()  # a file or a package may have come since: notebooks live long
        modules = _modules()
    if name not in modules:
        raise InvalidInput(f'unknown method "{name}"{nearest(name, sorted(modules))}')
    source, *others = modules[name]
    if others:
        raise InvalidInput(
            f'method "{name}" is offered by {" and ".join(modules[name])}; '
            "a name has one method: rename the entry point of the other package and its module, or uninstall it"
        )
    if source.rpartition(".")[2] != name:  # a method knows its name from its module
        raise InvalidInput(f'method "{name}" comes from {source}, whose last part is another name')
    module: ModuleType = importlib.import_module(source)
    found: type[Method] = module.METHOD
    return found


def build_method(name: str, options: Mapping[str, Any]) -> Method:
    """A method with checked options. Raises InvalidInput."""
    kind = lookup(name)
    try:
        return kind(**options)
    except pydantic.ValidationError as error:
        raise InvalidInput(f"{name}: {describe(error, [f.name for f in dataclasses.fields(kind)])}") from None  # type: ignore[arg-type]


def describe(error: pydantic.ValidationError, known: Iterable[str]) -> str:
    """One line for the first fault in a pydantic error."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f'unknown option "{where}"{nearest(where, known)}'
    if first["type"] == "missing":
        return f'the option "{where}" is missing'
    return f"{where}: {fault_message(first)}, got {reprlib.repr(first['input'])}"


def fault_message(fault: Mapping[str, Any]) -> str:
    """Pydantic's words for one fault, as the middle of a sentence."""
    message: str = fault["msg"]
    return message[0].lower() + message[1:]


def parse_recipe(entry: object) -> Recipe:
    """Read one entry of a job's `methods`: a name, a chain, or {name or chain: options}. Raises InvalidInput."""
    chain: object
    options: Any
    if isinstance(entry, str):
        chain, options = entry, {}
    elif isinstance(entry, Mapping) and len(entry) == 1:
        chain, options = next(iter(entry.items()))
    else:
        raise InvalidInput(f"expected a method name or {{name: options}}, got {reprlib.repr(entry)}")
    names = [part.strip() for part in str(chain).split("+")]
    given = _mapping(str(chain), options)
    if len(names) > 1:
        stray = sorted(set(map(str, given)) - set(names))
        if stray:
            raise InvalidInput(f'{chain}: options of a chain stand under its methods\' names, got "{stray[0]}"')
        methods = [build_method(name, _mapping(f"{chain}: {name}", given.get(name))) for name in names]
    else:
        methods = [build_method(names[0], given)]
    if len(set(names)) < len(names):
        raise InvalidInput(f"{chain}: a method stands twice")
    solvers = [method for method in methods if isinstance(method, WeightSolver)]
    rule = _solver_rule(solvers)
    if rule:
        raise InvalidInput(f"{chain}: {rule}")
    for site in sorted(frozenset().union(*(method.claims for method in methods)) - {"weight"}):
        both = [method.name for method in methods if site in method.claims - method.yields]
        if len(both) > 1:
            raise InvalidInput(f"{chain}: {' and '.join(both)} both quantize {site}; a site has one quantizer")
    if not solvers and any(isinstance(method, Wrapper) for method in methods):
        methods.append(build_method("rtn", {}))  # a term needs something to stand on; said here, it enters the identity
    return Recipe(tuple(sorted(methods, key=_rank)))


def _rank(method: Method) -> tuple[int, int]:
    """Where a method stands in a chain, however that is written."""
    return method.stage, 2 if isinstance(method, Wrapper) else int(isinstance(method, GridProvider))


def _solver_rule(solvers: Sequence[WeightSolver]) -> str | None:
    """The rule that these weight solvers of one chain break, or None."""
    if len(solvers) < 2:
        return None
    base = [solver for solver in solvers if not isinstance(solver, GridProvider)]
    if len(solvers) > 2 or len(base) != 1:
        names = " and ".join(solver.name for solver in solvers)
        return f"{names} both quantize weights; a recipe has one weight solver"
    if base[0].takes_grids:
        return None
    (provider,) = (solver.name for solver in solvers if isinstance(solver, GridProvider))
    return f"{base[0].name} has a grid of its own and takes none from {provider}; a recipe has one weight solver"


def _mapping(what: str, options: object) -> Mapping[str, Any]:
    if options is None:
        return {}
    if not isinstance(options, Mapping):
        raise InvalidInput(f"{what}: options are a mapping, got {reprlib.repr(options)}")
    return options
