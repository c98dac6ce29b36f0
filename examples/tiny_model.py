"""A tiny Llama, trained in under a minute on stories that this file makes up.

Quantization figures mean little on random weights, and real checkpoints are large downloads. The
model here is small but trained: it knows the phrases of its stories, counts in order and remembers
some of what it said, but muddles names, so judge it by its perplexity more than by its plots.
"""

from __future__ import annotations

import random
import tempfile
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = {"bos": "<|begin_of_text|>", "eos": "<|end_of_text|>", "pad": "<|pad|>"}
BOS, EOS, PAD = range(3)
VOCABULARY, MAX_LENGTH = 1024, 512
TOKENS_PER_STEP, PEAK_RATE = 1024, 8e-3
CONFIG: dict[str, Any] = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
CONFIG |= {"vocab_size": VOCABULARY, "max_position_embeddings": MAX_LENGTH, "num_hidden_layers": 4}
CONFIG |= {"hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 4, "head_dim": 32}
CONFIG |= {"num_key_value_heads": 2, "tie_word_embeddings": True, "initializer_range": 0.05}
# (steps, row length): short rows teach most of the language at less cost per token; the long ones
# at the end teach the positions that the short ones never reach.
PHASES = ((300, 128), (70, MAX_LENGTH))

CHOICES = {
    "colour": "red/green/blue/yellow/orange/ivory/silver/golden/purple/amber/black/white",
    "place": "by the old mill/in the forest/on the hill/at the market/under the bridge/on the beach"
    "/behind the barn/near the lake/in the attic/at the harbour/in the garden/beside the well",
    "time": "One morning/One evening/Late at night/After lunch/On a rainy day/Before breakfast"
    "/In the middle of winter/On the first day of spring",
    "pet": "Pip/Biscuit/Moss/Button/Pepper/Clover/Waffle/Ziggy",
    "counted": "plums/pears/nuts/eggs/buns/shells/stones/stamps/cherries/cookies/beans/marbles",
    "feeling": "happy/tired/proud/hungry/sleepy/brave/cold/merry",
    "quality": "gentle/old/bright/lazy/crooked/tiny/quiet/clever/dusty/enormous/polite/lonely"
    "/curious/shy/wobbly/ancient/noisy/patient/grumpy/hollow/foggy/cheerful/frozen/secret",
    "sight": "river/clock/tower/wind/cloud/teapot/train/lantern/mountain/star/shadow/kettle/cart"
    "/window/candle/statue/fountain/scarecrow/kitchen/thunder/piano/rabbit/wolf/stove",
    "deed": "danced/sang/waited/whispered/trembled/slept/glowed/grumbled/laughed/sighed/turned"
    "/listened/shone/hummed/yawned/shivered/smiled/creaked/rattled/dreamed",
    "manner": "softly/slowly/twice/loudly/alone/again/gladly/quickly/outside/nearby/forever",
    "chore": "baked bread/washed the socks/fed the hens/picked apples/read a book/rode to town"
    "/slept all day/planted roses/walked in the rain/built a wall",
    "person": "Mia she/Ada she/Ivy she/Nora she/Ella she/Rosa she/Lena she/Zoe she/Hana she"
    "/Ruth she/Pia she/Vera she/Tom he/Ben he/Max he/Otto he/Finn he/Hugo he/Leo he/Sam he/Omar he"
    "/Jack he/Paul he/Igor he",
    "tool": "key opened the rusty gate/lamp lit the dark path/rope climbed down the cliff"
    "/ladder reached the roof/map found the way home/drum woke the whole town/bell called the cows"
    "/spade dug a deep hole/net caught a fat fish/broom swept the hall/needle mended the sail"
    "/raft crossed the river/hammer fixed the fence/bucket watered the beans/axe chopped the wood"
    "/umbrella stayed dry in the storm/blanket kept warm until dawn/spoon stirred the soup"
    "/pencil wrote a long letter/flute played a slow song/coin paid the baker"
    "/brush painted the door/ribbon tied up the parcel/mirror sent a signal to the ship",
    "beast": "dog woof/cat meow/goose honk/duck quack/sheep baa/cow moo/owl hoot/frog croak"
    "/mouse squeak/donkey hee-haw/snake hiss/bee buzz",
    "number": "no/one/two/three/four/five/six/seven/eight/nine/ten/eleven/twelve/thirteen",
    "day": "Monday/Tuesday/Wednesday/Thursday/Friday/Saturday/Sunday",
    "rhyme": "cat hat mat bat/fox box ox/hen pen den/bee tree sea knee/goat boat coat moat"
    "/house blouse louse/bear chair pear stair/snail pail whale sail/log dog bog hog"
    "/moon spoon balloon/king ring string wing/snake cake lake rake",
}
WORDS = {kind: text.split("/") for kind, text in CHOICES.items()}
PRONOUNS = {"she": ("her", "her"), "he": ("him", "his")}
OPENINGS = (
    "{time} {hero} found {a_thing} {place}. {He} put it in {his} bag and went to see {friend}.",
    "{hero} lived {place} with a {animal} called {pet}. {time} {he} found {a_thing} there.",
    "{time}, {place}, {hero} met {friend}. {friend} gave {him} {a_thing} and said goodbye.",
)
BEATS = (
    '"What is in your bag?" asked {friend}. "{A_thing}," said {hero}.',
    "{hero} had {start} {counted}. {friend} gave {him} {more} more. Now {he} had {sum} {counted}.",
    "{friend} had {sum} {counted}. {fHe} ate {more} of them, so {start} {counted} were left.",
    "{hero} packed {a_first}, then {a_second}, then {a_third}. "
    "Out of the bag came the {first}, then the {second}, then the {third}.",
    "{hero} counted the {counted}: {counting}. {Sum} {counted}!",
    "On {day} {hero} {chore}. On {next_day} {he} {next_chore}. "
    "{friend} {next_chore} on {next_day} too, because {fhe} was {feeling}.",
    '{friend} sang to {him}: "{Song}." It made {him} {feeling}.',
    '"{Sound}, {sound}!" said {pet} the {animal}.',
)
CLOSINGS = (
    "With the {thing} {hero} {use}. So {he} was {feeling}, and {his} friend {friend} was too.",
    "{hero} took the {thing} out of {his} bag and {use}. {friend} thanked {him}.",
    "{friend} lost {fhis} way, but {hero} came with the {thing} and {use}.",
)
QUESTIONS = (
    "Who had the {thing}? {hero} had it.",
    "What did {hero} have? {A_thing}.",
    "Where did it begin? It began {place}.",
    "Who was the friend of {hero}? It was {friend}.",
    "What is {start} and {more}? It is {sum}.",
)


def _with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _scene(rng: random.Random) -> dict[str, str]:
    """Fix every choice of one story, so that its sentences agree with each other."""
    words = {kind: rng.choice(options) for kind, options in WORDS.items()}
    (hero, he), (friend, fhe) = (one.split() for one in rng.sample(WORDS["person"], 2))
    (him, his), (_, fhis) = PRONOUNS[he], PRONOUNS[fhe]
    words |= {"hero": hero, "he": he, "He": he.capitalize(), "him": him, "his": his}
    words |= {"friend": friend, "fhe": fhe, "fHe": fhe.capitalize(), "fhis": fhis}
    tool, words["use"] = words["tool"].split(" ", 1)
    words["thing"] = f"{words['colour']} {tool}"
    tools = [tool.split()[0] for tool in rng.sample(WORDS["tool"], 3)]
    words["first"], words["second"], words["third"] = tools
    nouns = ("thing", "first", "second", "third")
    words |= {f"a_{noun}": _with_article(words[noun]) for noun in nouns}
    words["animal"], words["sound"] = words["beast"].split()
    words["chore"], words["next_chore"] = rng.sample(WORDS["chore"], 2)
    start, more, day = rng.randint(2, 7), rng.randint(2, 6), rng.randrange(7)
    numbers = WORDS["number"]
    words |= {"start": numbers[start], "more": numbers[more], "sum": numbers[start + more]}
    words["counting"] = ", ".join(numbers[1 : start + more + 1])
    words["day"], words["next_day"] = WORDS["day"][day], WORDS["day"][(day + 1) % 7]
    pairs = [rng.sample(family.split(), 2) for family in rng.sample(WORDS["rhyme"], 2)]
    words["song"] = " and ".join(f"{_with_article(a)} with {_with_article(b)}" for a, b in pairs)
    raised = ("a_thing", "sum", "song", "sound")
    return words | {key.capitalize(): words[key].capitalize() for key in raised}


def _scenery(rng: random.Random) -> str:
    """Make a sentence of free choices, which keeps the text from being a puzzle with one answer."""
    words = (rng.choice(WORDS[kind]) for kind in ("quality", "sight", "deed", "manner"))
    return f"The {' '.join(words)}."


def make_text(seed: int, documents: int) -> list[str]:
    """Return self-made stories; training uses even seeds only, held-out text odd ones."""
    rng = random.Random(seed)
    stories: list[str] = []
    for _ in range(documents):
        parts = [rng.choice(OPENINGS), _scenery(rng), *rng.sample(BEATS, rng.randint(2, 4))]
        parts += [_scenery(rng), rng.choice(CLOSINGS), *rng.sample(QUESTIONS, 2)]
        stories.append(" ".join(parts).format_map(_scene(rng)))
    return stories


def _train_tokenizer(texts: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special, alphabet = list(SPECIAL.values()), sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _pack(tokenizer: Tokenizer, seed: int, rows: int, length: int) -> Tensor:
    """Tokenize fresh stories into rows that each start with one: int64 [rows, length]."""
    packed: list[list[int]] = []
    row: list[int] = []
    # No story is shorter than 64 tokens, so this many always fill the rows.
    for story in tokenizer.encode_batch(make_text(seed, rows * (length // 64 + 1))):
        row += [BOS, *story.ids, EOS]
        if len(row) >= length and len(packed) < rows:
            packed.append(row[:length])
            row = []
    return torch.tensor(packed)


def _train(model: LlamaForCausalLM, batches: list[Tensor]) -> None:
    """Train in place on batches of int64 [rows, length], each seen once."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, PEAK_RATE, len(batches), pct_start=0.06, cycle_momentum=False
    )
    for batch in tqdm(batches, desc="training a tiny model", disable=None):
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


def _save(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    # save_pretrained draws a bar even where the error stream is no terminal.
    with redirect_stderr(StringIO()):
        model.bfloat16().save_pretrained(folder)
    special = {f"{role}_token": token for role, token in SPECIAL.items()}
    wrapped = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call, unused-ignore]
        tokenizer_object=tokenizer, model_max_length=MAX_LENGTH, **special
    )
    wrapped.save_pretrained(folder)


def _make(folder: Path, seed: int) -> None:
    tokenizer = _train_tokenizer(make_text(4 * seed, 2000))
    batches: list[Tensor] = []
    for phase, (steps, length) in enumerate(PHASES):
        rows = TOKENS_PER_STEP // length
        tokens = _pack(tokenizer, 4 * seed + 2 * phase, steps * rows, length)
        batches += tokens.view(steps, rows, length)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG))
    _train(model, batches)
    _save(model, tokenizer, folder)


def build_tiny_model(folder: Path, *, seed: int = 0) -> Path:
    """Train the model and save model and tokenizer into a new folder, then return the folder.

    The same seed gives the same bytes on the same machine. The folder appears only when it is
    whole; the random state and the thread count of torch are left as they were.

    Raises:
        FileExistsError: If the folder exists already.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} exists already: remove it, or name another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    threads = torch.get_num_threads()
    scratch = tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent)
    with scratch, torch.random.fork_rng(devices=[]), torch.enable_grad():
        # torch.manual_seed would reseed the caller's accelerators too.
        torch.default_generator.manual_seed(seed)
        # Fixed, so that the bytes never depend on the caller; one, because threads that wait for
        # each other on cores shared with other programs can take ten times as long as one.
        torch.set_num_threads(1)
        try:
            _make(Path(scratch.name) / "whole", seed)
        finally:
            torch.set_num_threads(threads)
        (Path(scratch.name) / "whole").rename(folder)
    return folder


def heldout_tokens(folder: Path, rows: int, length: int, *, seed: int = 1) -> Tensor:
    """Tokenize stories from seeds that no training uses: int64 [rows, length], BOS first."""
    if not 1 <= length <= MAX_LENGTH:
        raise ValueError(f"length is {length}: the model takes 1 to {MAX_LENGTH} tokens a row")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return _pack(tokenizer, 2 * seed + 1, rows, length)
