"""From batches to blocks: what is captured, summed, diagonalised and divided."""
