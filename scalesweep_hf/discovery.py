"""Tell Transformers and lm-eval of this package, when they are imported and not before.

Runs when the package is imported, which ``scalesweep_hf.pth`` does at every start of an
interpreter: so it imports nothing itself. `FOLLOWERS` says what follows which import; what they
register are names, behind which the package is imported once something is loaded by them.
"""

import sys

TYPE_CHECKING = False  # that of `typing` costs an import
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any


class Stub:
    """Stands for a class of this package until it is called or asked for an attribute."""

    def __init__(self, home: str, name: str) -> None:
        """Keep the name of the class and of its module."""
        self._home, self._name = home, name

    def _load(self) -> "Any":
        from importlib import import_module

        import_module("scalesweep_hf.quantizer")  # registers the rest
        return getattr(import_module(f"scalesweep_hf.{self._home}"), self._name)

    def __call__(self, *args: "Any", **kwargs: "Any") -> "Any":
        """Call what it stands for."""
        return self._load()(*args, **kwargs)

    def __getattr__(self, name: str) -> "Any":
        """Return an attribute of what it stands for."""
        if name.startswith("__"):  # inspection loads nothing
            raise AttributeError(name)
        return getattr(self._load(), name)


def register_methods(auto: "Any") -> None:
    """Add our methods to ``transformers.quantizers.auto``; those already there stay."""
    quantizer = Stub("quantizer", "ScaleSweepHfQuantizer")
    for method, config in CONFIGS.items():
        if method not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING:
            auto.AUTO_QUANTIZATION_CONFIG_MAPPING[method] = config
            auto.AUTO_QUANTIZER_MAPPING[method] = quantizer


def register_model(models: "Any") -> None:
    """Add the model "scalesweep" to lm-eval, once its own models are there."""
    registry = getattr(sys.modules.get("lm_eval.api.registry"), "model_registry", None)
    if registry is not None and "scalesweep" not in registry:  # older versions have none
        registry.register("scalesweep", target="scalesweep_hf.evaluate.harness:ScaleSweepLM")


CONFIGS = {
    "scalesweep": Stub("config", "ScaleSweepConfig"),
    "modelopt": Stub("modelopt", "ModelOptConfig"),
}
FOLLOWERS: "dict[str, Callable[[Any], None]]" = {
    "transformers.quantizers.auto": register_methods,
    "lm_eval.models": register_model,
}


def follow(name: str) -> None:
    """Do what follows the import of a module; a failure is logged and leaves the import alone."""
    try:
        FOLLOWERS[name](sys.modules[name])
    except Exception:
        import logging

        logging.getLogger("scalesweep_hf").exception(f"could not register with {name}")


class Loader:
    """Another loader, and then `follow`."""

    def __init__(self, loader: "Any") -> None:
        """Keep the loader."""
        self._loader = loader

    def __getattr__(self, name: str) -> "Any":
        """Answer as the other loader in everything else."""
        return getattr(self._loader, name)

    def create_module(self, spec: "ModuleSpec") -> "ModuleType | None":
        """Let the other loader create the module."""
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: "Any") -> None:
        """Run the module as if the other loader had been there alone."""
        module.__loader__ = module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        follow(module.__name__)


class Finder:
    """Finds nothing itself, and gives what others find to `Loader` where something follows."""

    def find_spec(
        self, name: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        """Return the spec of the first finder behind this one that has one."""
        if name not in FOLLOWERS or self not in sys.meta_path:
            return None
        for finder in sys.meta_path[sys.meta_path.index(self) + 1 :]:
            if not hasattr(finder, "find_spec"):  # as importlib does
                continue
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                if hasattr(spec.loader, "exec_module"):
                    spec.loader = Loader(spec.loader)  # type: ignore[assignment]
                return spec
        return None


def install() -> None:
    """See to the modules that are imported already and to those that will be; safe to repeat."""
    if not any(type(finder).__module__ == __name__ for finder in sys.meta_path):
        sys.meta_path.insert(0, Finder())
    for name in FOLLOWERS:
        if name in sys.modules:
            follow(name)
