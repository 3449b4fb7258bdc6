"""Processes that encode documents.

Workers are neither forked nor started by multiprocessing: those would inherit the threads of torch
and of the tokenizers library, or import the main program again. A worker runs this module, reads
batches from its standard input and writes ids to its standard output.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from queue import SimpleQueue
from typing import Any

import numpy as np

from data_modules.encoding import Encoded, Piece, batches, encode_batch
from data_modules.overlap import LineOverlap
from data_modules.splitting import DocumentSplit
from data_modules.token_store import token_dtype
from data_modules.tokenizers.base import Tokenizer, class_of, tokenizer_from_state
from mtp_lightning.errors import UserError
from mtp_lightning.system import cores

LARGE = 1 << 26
"""Bytes from which several processes encode a corpus."""


def pick_workers(requested: int | None, tokenizer: Tokenizer, total_bytes: int | None) -> int:
    """Number of processes that encode a corpus: the requested one (None: one per core if the corpus
    is large or of unknown size), or 0, which encodes in this process as user-defined tokenizers
    must."""
    if class_of(tokenizer.kind) is not type(tokenizer):
        return 0
    if requested is not None:
        return requested
    if total_bytes is not None and total_bytes < LARGE:
        return 0
    n = cores()
    return n if n > 1 else 0


def encode_documents(
    split: DocumentSplit, tokenizer: Tokenizer, overlap: LineOverlap, *, workers: int
) -> Iterator[Encoded]:
    """Yields the pieces of all documents in order, encoded by ``workers`` processes, or here if
    that is 0. ``overlap`` is complete at the end."""
    dtype, todo = token_dtype(tokenizer.vocab_size), batches(split, overlap)
    if not workers:
        for batch in todo:
            yield from encode_batch(batch, tokenizer, dtype, overlap)
        return
    with closing(EncodingPool(tokenizer, dtype, workers)) as pool:
        for pieces in pool.map(todo):
            yield from pieces
        for other in pool.overlaps():
            overlap.merge(other)


def _ended(process: subprocess.Popen[bytes]) -> RuntimeError:
    return RuntimeError(
        f"a process that encodes text ended with code {process.wait()}: it may have run out of "
        "memory; data.build_workers=0 encodes without such processes"
    )


class EncodingPool:
    """Processes that encode batches of pieces, in order, as ids of ``dtype``. The tokenizer is a
    trained one of this project's kinds."""

    def __init__(self, tokenizer: Tokenizer, dtype: np.dtype, workers: int) -> None:
        # Each worker encodes with one thread, since there is one worker per core.
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
            "TOKENIZERS_PARALLELISM": "false",
            "OMP_NUM_THREADS": "1",
        }
        self._processes = [
            subprocess.Popen(
                [sys.executable, "-P", "-m", "data_modules.encoding_pool"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
                process_group=0,  # Ctrl-C is for the parent, which closes their input
            )
            for _ in range(workers)
        ]
        self._idle: SimpleQueue[subprocess.Popen[bytes]] = SimpleQueue()
        self._threads = ThreadPoolExecutor(workers)
        for process in self._processes:
            try:
                _send(process.stdin, (tokenizer.state(), dtype.str))
            except OSError:
                self.close()
                raise _ended(process) from None
            self._idle.put(process)

    def map(self, batches: Iterable[list[Piece]]) -> Iterator[list[Encoded]]:
        """Yields :func:`encode_batch` of every batch, in order.

        Raises:
            RuntimeError: if a worker was killed or failed.
            UserError: see :func:`encode_batch`, and for a text that the tokenizer refuses.
        """
        ahead: deque[Future[list[Encoded]]] = deque()
        for batch in batches:
            ahead.append(self._threads.submit(self._encode, batch))
            if len(ahead) > 2 * len(self._processes):
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()

    def _encode(self, batch: list[Piece]) -> list[Encoded]:
        process = self._idle.get()
        try:
            return self._ask(process, batch)
        finally:
            self._idle.put(process)

    @staticmethod
    def _ask(process: subprocess.Popen[bytes], question: Any) -> Any:
        try:
            _send(process.stdin, question)
            answer = pickle.load(process.stdout)  # type: ignore[arg-type]  # our own worker's
        except (OSError, EOFError, pickle.UnpicklingError):
            raise _ended(process) from None
        if isinstance(answer, UserError):
            raise answer
        return answer

    def overlaps(self) -> list[LineOverlap]:
        """The workers' line counts; call this after :meth:`map`."""
        return [self._ask(process, None) for process in self._processes]

    def close(self) -> None:
        """Ends the workers, busy or idle."""
        for process in self._processes:
            process.kill()
        self._threads.shutdown()
        for process in self._processes:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with suppress(OSError):  # the pipe may still hold unsent data
                    pipe.close()  # type: ignore[union-attr]


def _send(file: Any, message: Any) -> None:
    pickle.dump(message, file, protocol=5)
    file.flush()


def _work() -> None:
    """The worker's loop, which ends with the main process."""
    questions, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # output that a library prints must not mix with the answers
    # The main process has ended; closing the answers fails, too, on one that nobody reads.
    with suppress(EOFError, pickle.UnpicklingError, BrokenPipeError), answers:
        state, dtype = pickle.load(questions)
        tokenizer, overlap = tokenizer_from_state(state), LineOverlap()
        while True:
            batch = pickle.load(questions)
            answer: Any = overlap
            if batch is not None:
                try:
                    answer = encode_batch(batch, tokenizer, np.dtype(dtype), overlap)
                except UserError as error:
                    answer = error
            _send(answers, answer)


if __name__ == "__main__":
    _work()
