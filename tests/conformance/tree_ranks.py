"""One rank of ranks.py that also knows the wrapper "tree", and runs the cases of the tree after the others."""

import ranks
from communicator_cases import CASES, WRAPPERS
from tree_cases import TREE_CASES

from collectives.tree import TreeReduce

if __name__ == "__main__":
    WRAPPERS["tree"] = TreeReduce
    CASES.update(TREE_CASES)
    ranks.main()
