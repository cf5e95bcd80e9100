"""The value model for SGLang (SGLANG_EXTERNAL_MODEL_PACKAGE): it scans the modules of this folder for an `EntryClass`.

SGLang only logs what fails here, and then serves another class or none: whoever asks checks what answers.
"""
