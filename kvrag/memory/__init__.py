"""What a long chat keeps: policies that choose which tokens stay in a bounded memory."""
