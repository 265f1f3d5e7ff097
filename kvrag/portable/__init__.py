"""A collection as one file that can be carried elsewhere: documents, vectors, settings and caches, signed.

No pickle, nothing compressed, nothing encoded anew. `archive` is the container, `signing` says who vouches
for it, `outgoing` writes it, `staging` proves all of it, and only then `incoming` changes anything.
"""

from kvrag.portable.archive import Refused
from kvrag.portable.incoming import ImportReport, import_collection
from kvrag.portable.outgoing import ExportReport, export_collection
from kvrag.portable.signing import make_keys, private_key, public_key

__all__ = [
    "ExportReport",
    "ImportReport",
    "Refused",
    "export_collection",
    "import_collection",
    "make_keys",
    "private_key",
    "public_key",
]
