"""Stands in for vllm, of which sglang imports one kernel where no kernel package is installed."""
