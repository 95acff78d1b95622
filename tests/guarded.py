"""What the tests of misuse stand on: tensors that end at an unreadable page, and a process of its
own for each call."""
import ctypes
import json
import mmap
import os
import signal

import torch

PAGE = mmap.PAGESIZE
_libc = ctypes.CDLL(None, use_errno=True)
_kept = []          # maps live as long as the process


def span(tensor: torch.Tensor) -> int:
    "How many numbers lie between a tensor's first and its last, both counted."
    if not tensor.numel(): return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))


def guarded(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers in the same layout, in memory of their own that ends where an unreadable
    page begins."""
    count = span(tensor)
    if not tensor.is_cpu or not count: return tensor
    size = count * tensor.element_size()
    readable = -(-size // PAGE) * PAGE
    memory = mmap.mmap(-1, readable + PAGE)
    _kept.append(memory)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    if _libc.mprotect(ctypes.c_void_p(start + readable), PAGE, 0):
        raise OSError(ctypes.get_errno(), "mprotect")
    buffer = (ctypes.c_uint8 * size).from_address(start + readable - size)
    flat = torch.frombuffer(buffer, dtype=tensor.dtype)
    flat.copy_(tensor.detach().as_strided((count,), (1,), tensor.storage_offset()))
    return flat.as_strided(tensor.shape, tensor.stride())


def in_child(function, seconds: int = 30) -> str:
    """What `function` returns, a string, in a forked process; `died of ...` where that did not come
    to its end."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(seconds)
        os.close(read)
        try: answer = function()
        except BaseException as error:
            answer = f"{type(error).__name__} in the test itself: {error}"
        os.write(write, json.dumps(str(answer)[:3000]).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as file: answer = file.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status): return f"died of {signal.Signals(os.WTERMSIG(status)).name}"
    return json.loads(answer)
