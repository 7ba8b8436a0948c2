"""The main job: fine-tune a Transformers model with any recipe, and report what it cost beside a frozen model
and PEFT."""
