"""fastomni trains omni-multimodal language models with verifiable rewards.

Importing it is cheap and loads no torch: `fastomni.config` must be able to refuse a mistyped key in
a fraction of a second. The kernels are a package of their own in the same distribution; that they
are missing is said here, once, for every entry point.
"""

from importlib.util import find_spec

__version__ = "0.1.0"

if find_spec("fastomni_kernels") is None:
    raise ModuleNotFoundError(
        "fastomni_kernels, which is installed together with fastomni, cannot be found; "
        "run in the folder that holds setup.py: pip install -e . --no-build-isolation",
        name="fastomni_kernels",
    )
