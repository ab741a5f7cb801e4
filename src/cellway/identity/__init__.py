"""The built-in identity of the embedded mode: a Keystone v3 subset and a read-only image list.

A shell: `app.py` of the owner builds it with `build(...)` and hands its verifier and image catalogue to the other
parts as the protocols of `outside.py`. It imports words only.
"""

from cellway.identity.app import BuiltinIdentity, build

__all__ = ["BuiltinIdentity", "build"]
