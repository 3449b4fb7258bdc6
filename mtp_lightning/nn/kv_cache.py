"""Keys and values of the tokens already read, preallocated, one row's length free of another's."""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Storage for ``n_layers`` attention layers of one model.

    Rows of a batch may hold different numbers of tokens. Dropping tokens (a rejected draft) only
    moves a length: what lies behind it is overwritten before it can be read.

    Args:
        n_layers: attention layers that write here.
        batch_size: B, rows.
        n_kv_heads: key-value heads.
        d_head: H, size of one head.
        capacity: S, most tokens a row can hold.
        dtype: of the keys and values.
        device: where they live.
    """

    def __init__(
        self,
        *,
        n_layers: int,
        batch_size: int,
        n_kv_heads: int,
        d_head: int,
        capacity: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (n_layers, batch_size, n_kv_heads, capacity, d_head)
        self.keys_LBNSH = torch.zeros(shape, dtype=dtype, device=device)
        self.values_LBNSH = torch.zeros(shape, dtype=dtype, device=device)
        self.capacity = capacity
        self.lengths = [0] * batch_size

    @property
    def batch_size(self) -> int:
        """Rows held."""
        return len(self.lengths)

    def positions(self, n_new: int) -> Tensor:
        """Positions [B, n_new] of the next tokens of every row.

        Raises:
            ValueError: a row would outgrow the cache.
        """
        longest = max(self.lengths) + n_new
        if longest > self.capacity:
            raise ValueError(
                f"{longest} tokens do not fit into a cache of {self.capacity}: "
                "shorten the prompt, or ask for fewer new tokens."
            )
        start_B1 = torch.tensor(self.lengths, device=self.keys_LBNSH.device).unsqueeze(1)
        return start_B1 + torch.arange(n_new, device=start_B1.device)

    def mask(self, positions_BT: Tensor) -> Tensor:
        """Which of the stored keys each new token sees: bool [B, 1, T, S'], True where it does.

        S' is what :meth:`append` returns: the longest row, the new tokens included.
        """
        longest = max(self.lengths) + positions_BT.shape[1]
        stored_S = torch.arange(longest, device=positions_BT.device)
        return (stored_S <= positions_BT.unsqueeze(-1)).unsqueeze(1)

    def append(self, layer: int, key_BNTH: Tensor, value_BNTH: Tensor) -> tuple[Tensor, Tensor]:
        """Store a layer's new keys and values behind every row's; return all up to the longest.

        Lengths do not move here, since every layer of a pass appends at the same place: call
        :meth:`advance` once a pass.
        """
        n_new = key_BNTH.shape[2]
        longest = max(self.lengths) + n_new
        keys, values = self.keys_LBNSH[layer], self.values_LBNSH[layer]
        if min(self.lengths) == max(self.lengths):
            keys[:, :, longest - n_new : longest] = key_BNTH
            values[:, :, longest - n_new : longest] = value_BNTH
        else:
            for row, length in enumerate(self.lengths):
                keys[row, :, length : length + n_new] = key_BNTH[row]
                values[row, :, length : length + n_new] = value_BNTH[row]
        return keys[:, :, :longest], values[:, :, :longest]

    def advance(self, n_new: int) -> None:
        """Count ``n_new`` more tokens in every row."""
        self.lengths = [length + n_new for length in self.lengths]

    def trim(self, lengths: list[int]) -> None:
        """Forget the tokens beyond ``lengths``, one number a row."""
        assert len(lengths) == len(self.lengths)
        assert all(0 <= new <= old for new, old in zip(lengths, self.lengths, strict=True))
        self.lengths = list(lengths)
