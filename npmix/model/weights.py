"""The weights as kernels see them: a table of addresses into the source's maps.

One hard fact: nothing is copied but the norms (a few KiB a layer, as padded float32), so the source
must stay open as long as this object is used.
"""

from typing import NamedTuple

import numpy as np

from ..config import Config
from ..errors import StoreError
from ..formats import DENSE, span_bytes
from ..kernels import tables


class Slot(NamedTuple):
    """One kind of matrix, as `kernels.matmul.matmul` takes it; several: False where only routers are of this kind."""

    format: str
    group: int
    several: bool = True


class Weights:
    """config: Config. slots: the at most four kinds of matrix in use. layers: int64 (n_layers, columns)."""

    def __init__(self, source):
        self.config: Config = source.config
        self._source = source
        self._kept = []  # whatever an address points into
        self.slots: list[Slot] = []
        routers, others = set(), set()  # slots by who uses them
        self._users = routers, others
        columns = tables.EXPERTS + 3 * self.config.n_experts
        self.layers = np.zeros((self.config.n_layers, columns), np.int64)
        for layer in range(self.config.n_layers):
            self._fill(layer, self.layers[layer])
        self.norm = self._norm("norm")
        self.output, self.output_slot = self._matrix("output")
        for slot in routers - others:
            self.slots[slot] = self.slots[slot]._replace(several=False)
        table = source.tensor("tok_embeddings")
        self._kept.append(table.data)
        self.embeddings, self.embeddings_kind = table.address, (table.format, table.group)

    def _fill(self, layer: int, row: np.ndarray) -> None:
        at, config = f"layers.{layer}.", self.config
        row[tables.ATTENTION_NORM] = self._norm(at + "attention_norm")
        row[tables.FFN_NORM] = self._norm(at + "ffn_norm")
        for name, column in (("wq", tables.WQ), ("wk", tables.WK), ("wv", tables.WV), ("wo", tables.WO)):
            row[column : column + 2] = self._matrix(at + name)
        if config.has_router and config.n_experts > 1:
            row[tables.ROUTER], row[tables.ROUTER_SLOT] = self._matrix(at + "router")
            if self.slots[row[tables.ROUTER_SLOT]].group:
                raise StoreError(f"{at}router is quantised; expected float weights (near-ties flip experts)")
        kinds = {}
        for expert in range(config.n_experts):
            for i, name in enumerate(("w_gate", "w_up", "w_down")):
                address, slot = self._matrix(f"{at}experts.{expert}.{name}")
                row[tables.EXPERTS + 3 * expert + i] = address
                if kinds.setdefault(i // 2, slot) != slot:
                    raise StoreError(
                        f"{at}experts.{expert}.{name} is {self.slots[slot][:2]}, others of the layer {self.slots[kinds[i // 2]][:2]}"
                    )
        row[tables.GATE_SLOT], row[tables.DOWN_SLOT] = kinds[0], kinds[1]
        groups = {self.slots[row[c]].group for c in (tables.WQ_SLOT, tables.WK_SLOT, tables.WV_SLOT)}
        if len(groups) > 1:
            raise StoreError(f"{at}wq, wk, wv have groups {sorted(groups)}; they share their quantised input, so one group is expected")

    def _matrix(self, name: str) -> tuple[int, int]:
        tensor = self._source.tensor(name)
        self._kept.append(tensor.data)
        slot = Slot(tensor.format, tensor.group)
        if slot not in self.slots:
            if len(self.slots) == tables.SLOTS:
                raise StoreError(f"{name} is {slot.format} group {slot.group}, a fifth format; at most {tables.SLOTS} are supported")
            self.slots.append(slot)
        index = self.slots.index(slot)
        self._users[not name.endswith("router")].add(index)
        return tensor.address, index

    def _norm(self, name: str) -> int:
        tensor = self._source.tensor(name)
        if tensor.format not in DENSE:
            raise StoreError(f"{name} is {tensor.format}, expected float weights")
        values = tensor.data
        if tensor.format == "bf16":
            values = (values.astype(np.uint32) << 16).view(np.float32)
        padded = np.zeros(-(-values.size // 16) * 16, np.float32)
        padded[: values.size] = values.reshape(-1)
        self._kept.append(padded)
        return padded.__array_interface__["data"][0]

    def group(self, slot: int) -> int:
        """Inputs per scale of a slot, 0 for a dense or unused one."""
        return self.slots[slot].group if slot < len(self.slots) else 0

    def span(self, slot: int) -> int:
        """Bytes of a pair of groups of 16 rows, 0 for a dense or unused slot."""
        return span_bytes(*self.slots[slot][:2]) if self.group(slot) else 0

    def bytes_per_token(self) -> int:
        """Bytes of weights that one decoded token reads: all matrices, but only the active experts, one embedding row aside."""
        c, total = self.config, self._source.tensor("output").nbytes if self.config.tied_embeddings else 0
        for name, shape in c.tensor_shapes().items():
            if len(shape) == 2 and name != "tok_embeddings":
                size = self._source.tensor(name).nbytes
                total += size * c.n_active // c.n_experts if ".experts." in name else size
        return total

    def close(self) -> None:
        """Drop every view of the source's maps."""
        self._kept.clear()
        self.layers[:] = 0
