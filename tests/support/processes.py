"""Several processes at once."""

import sys


def torchrun(count):
    """Begin a command for so many processes, which meet at a free port: other tests may run beside this one."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
