"""Small JSON files (config.json, an index, a manifest) read with every failure turned into one line.

One hard fact: such a file is at most a few megabytes; a larger one is refused before it is read.
"""

import json
from pathlib import Path

from ..errors import NpmixError

LARGEST = 64 << 20  # bytes; the index of Mixtral-8x7B has 92 KB


def read_json(path: Path, error: type[NpmixError]) -> dict:
    """The object in the file at `path`; raises `error` if it is missing, unreadable or no JSON object."""
    try:
        size = path.stat().st_size
        if size > LARGEST:
            raise error(f"{path} has {size} bytes, expected a JSON file of at most {LARGEST}")
        data = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise error(f"{path} does not exist") from None
    except OSError as e:
        raise error(f"cannot read {path}: {e.strerror or e}") from None
    except (ValueError, RecursionError) as e:
        raise error(f"{path} is not valid JSON ({str(e)[:120]}): download or convert it again") from None
    if not isinstance(data, dict):
        raise error(f"{path} holds a JSON {type(data).__name__}, expected an object")
    return data
