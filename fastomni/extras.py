"""Optional packages: imported where they are used, and named with their command where missing.

An extra's name is the one in pyproject.toml; a test holds the two lists together.
"""

from __future__ import annotations

import importlib
from types import ModuleType

MODULES = {
    "dali": "nvidia.dali",
    "flash": "flash_attn",
    "deepspeed": "deepspeed",
    "liger": "liger_kernel",
    "trl": "trl",
}


def require(extra: str, module: str | None = None) -> ModuleType:
    """Imports a module of an optional package.

    Args:
        extra: name of the extra in pyproject.toml.
        module: what to import; None: the extra's main module.

    Returns:
        The module.

    Raises:
        ImportError: where it is missing, with the command that installs it, or where it is
            installed but cannot be loaded, with the reason.
        KeyError: for an extra that does not exist.
    """
    main = MODULES[extra]
    name = main if module is None else module
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{name}.".startswith(f"{error.name}."):
            raise ImportError(
                f"{name} is not installed; run in the folder that holds setup.py: "
                f'pip install -e ".[{extra}]" --no-build-isolation',
                name=name,
            ) from None
        raise ImportError(
            f"{name} is installed but cannot be loaded: {error}", name=name
        ) from error
    except ImportError as error:
        raise ImportError(
            f"{name} is installed but cannot be loaded: {error}", name=name
        ) from error
