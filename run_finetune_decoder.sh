#!/usr/bin/env bash
# The same as run_decoder_finetune_tokenizer.sh, under a shorter name.
exec bash "$(dirname "${BASH_SOURCE[0]}")/run_decoder_finetune_tokenizer.sh" "$@"
