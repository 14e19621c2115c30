"""From judged answers to rates, intervals and verdicts. Reads no file."""
