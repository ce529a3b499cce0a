"The command `reidnb` as a module: `python -m reidnb`, `torchrun -m reidnb`, `accelerate launch -m reidnb`."
import sys

from reidnb.practice.cli import main   # loads no torch: main sets what must be set before

if __name__ == '__main__': sys.exit(main())
