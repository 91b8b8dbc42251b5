"""What is run over a model: the embedded model, authors and general text, and readers of files."""

from libortho.data.authors import Author, Fact, fictional_authors
from libortho.data.embedded import embedded_model_path
from libortho.data.examples import Example, read_jsonl
from libortho.data.general import general_text
from libortho.data.tasks import Task, embedded_task, tofu_benchmark, tofu_task
from libortho.data.tokens import Tokens, encode

__all__ = [
    "Author",
    "Example",
    "Fact",
    "Task",
    "Tokens",
    "embedded_model_path",
    "embedded_task",
    "encode",
    "fictional_authors",
    "general_text",
    "read_jsonl",
    "tofu_benchmark",
    "tofu_task",
]
