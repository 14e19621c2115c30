"""The mixin that adds penalties to a loss, the trainers that it makes, and what watches a run."""
