"""`relufy.Engine`: open a packed model, or a checkpoint (packed on first use), and write text with it."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Unpack, cast

from relufy.engine.cache import packed_model
from relufy.engine.cpu import CpuEngine
from relufy.engine.generate import Generation
from relufy.engine.pack import purpose_of
from relufy.engine.packed_file import is_packed_file
from relufy.engine.request import GenerationOptions, Request, make_request
from relufy.engine.reuse import Reuse, as_reuse
from relufy.engine.speculation import Speculation
from relufy.engine.speculator import Speculator
from relufy.engine.tokenizer import ModelTokenizer
from relufy.errors import UserError

if TYPE_CHECKING:
    from relufy.engine.chat_template import ChatTemplate, Message


class Engine(CpuEngine):
    """The CPU engine with the model's tokenizer.

        engine = relufy.Engine("relufy-demo/stage1")
        for piece in engine.generate("It was a dark night", max_new_tokens=50):
            print(piece, end="")

    `model` is a packed file, a checkpoint folder, "bundled" or a hub id; `dtype` is the type of the weights
    that a checkpoint is packed in ("f32", "bf16", "int8", "int4"). `reuse`, if generations are not told
    otherwise, lets their tokens reuse neurons; `for_reuse` packs a checkpoint so that they could, which a
    model that drafts for itself needs. `predictor` likewise lets tokens compute only the neurons that the
    model's predictor names (`relufy predictor` makes one). See CpuEngine for the other arguments and the
    interface by tokens. Raises UserError if it can't be run.
    """

    def __init__(
        self,
        model: str | Path,
        threads: int | None = None,
        context: int | None = None,
        skip: bool = True,
        kv_dtype: str | None = None,
        load: bool = False,
        dtype: str | None = None,
        mlock: bool = False,
        threads_of: CpuEngine | None = None,
        reuse: Reuse | int | None = None,
        for_reuse: bool = False,
        predictor: bool = False,
    ):
        path = Path(model)
        if is_packed_file(path):
            if dtype is not None:
                raise UserError(f"{path} is packed already; dtype is for a checkpoint")
        else:
            for_ = "predictor" if predictor else purpose_of(model, for_reuse or reuse is not None)
            path = packed_model(model, dtype or "f32", for_=for_)
        super().__init__(path, threads, context, skip, kv_dtype, load, mlock, threads_of)
        self.reuse = None if reuse is None else as_reuse(reuse)
        if self.reuse:
            self.check_reuse()
        self.predictor = predictor
        if predictor:
            self.check_predictor()
        self._dtype = dtype
        self._drafts: dict[str, CpuEngine] = {}
        self._tokenizer: ModelTokenizer | None = None
        self._templates: dict[str | None, ChatTemplate] = {}

    @property
    def tokenizer(self) -> ModelTokenizer:
        if self._tokenizer is None:
            self._tokenizer = ModelTokenizer(self.header)
        return self._tokenizer

    def recommended_options(self) -> GenerationOptions:
        """Return how the model's makers sample (generation_config.json); greedily if they do not say."""
        settings = self.tokenizer.generation_settings
        if not settings.get("do_sample"):
            return {}
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        found = {"temperature": 1.0} | {
            name: settings[name] for name in names if settings.get(name) is not None
        }
        return cast(GenerationOptions, found)

    def generate(
        self, prompt: str, max_new_tokens: int | None = 128, **options: Unpack[GenerationOptions]
    ) -> Generation:
        """Continue a text: iterate over the result for its pieces, or `.run()` it; then see `.text` and
        `.stats`.

        GenerationOptions says what the options are; the default is greedy. `max_new_tokens` None goes on
        until the model ends its text or the context is full. Raises UserError if the prompt is longer than
        the context, unless the context slides.
        """
        ids = self.tokenizer.encode(prompt)
        request = make_request(ids, max_new_tokens, options, self.tokenizer.eos_ids)
        return self._generation(request)

    def chat(
        self,
        messages: Sequence["Message"],
        max_new_tokens: int | None = None,
        template: str | None = None,
        **options: Unpack[GenerationOptions],
    ) -> Generation:
        """Answer a conversation, `[{"role": "user", "content": "..."}, ...]`, as `generate` continues a text.

        The messages are written by the model's chat template, by another one of its (`template` is its name),
        or by `template` itself, the text of one; chat_template.PLAIN suits base models. Raises UserError if
        there is no template, or it refuses the messages.
        """
        from relufy.engine.chat_template import PLAIN, PLAIN_STOP

        ids = self.chat_ids(messages, template)
        stops = (PLAIN_STOP,) if template == PLAIN else ()
        request = make_request(ids, max_new_tokens, options, self.tokenizer.turn_ends(), stops)
        return self._generation(request)

    def _generation(self, request: Request) -> Generation:
        request = replace(request, reuse=request.reuse or self.reuse)
        if request.reuse:
            self.check_reuse()
        request = replace(request, predictor=request.predictor or self.predictor)
        if request.predictor:
            self.check_predictor()
        return Generation(self, self.tokenizer, request, self.speculator(request.speculation))

    def speculator(self, speculation: Speculation | None) -> Speculator | None:
        """Return what decodes by a speculation. Its draft model is opened once and kept.

        Raises UserError if that can't draft for this model.
        """
        if speculation is None:
            return None
        has_draft = not (speculation.is_lookup or speculation.is_self)
        return Speculator(self, speculation, self._draft(speculation.draft) if has_draft else None)

    def _draft(self, draft: str | Path | CpuEngine) -> CpuEngine:
        if isinstance(draft, CpuEngine):
            return draft
        if str(draft) not in self._drafts:
            dtype = None if is_packed_file(Path(draft)) else self._dtype
            self._drafts[str(draft)] = Engine(
                draft, context=self.native.context, dtype=dtype, threads_of=self
            )
        return self._drafts[str(draft)]

    def chat_ids(self, messages: Sequence["Message"], template: str | None = None) -> list[int]:
        """Return the tokens that ask for an answer to the messages, as `chat` gives them to the model."""
        from relufy.engine.chat_template import ChatTemplate, template_source

        if template not in self._templates:
            source = template_source(self.header, template)
            self._templates[template] = ChatTemplate(source, self.tokenizer.special_tokens())
        text = self._templates[template].render(messages)
        return self.tokenizer.encode(text, add_special_tokens=False)
