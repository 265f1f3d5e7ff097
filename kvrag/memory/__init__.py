"""What a long chat keeps: policies that choose, by scores or by pattern, which tokens stay in a bounded memory."""
