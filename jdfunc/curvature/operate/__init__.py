"""What is computed with blocks: powers, scalars, samples, Gramians in the metric."""
