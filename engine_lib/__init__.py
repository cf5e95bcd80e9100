"""Generators behind one small asynchronous interface: transformers, SGLang in process, SGLang servers."""
