"""The demo's task and model: recall a fact, stated before a long text, after it.

A chat: the user states one fact (`the code word of Alice is "falcon"`), a passage of real English text follows, then
the question; the assistant answers with the word. Fact and answer lie in different halves of the chat, so with
sequence_parallel_size 2 they lie on different ranks: only attention across ranks can carry the word.
"""

import glob
import json
import os
import random
import re

NAMES = (
    "Alice Bob Carol David Emma Frank Grace Henry Irene Jack Karen Louis Maria Nathan Olga Peter Rachel Simon Teresa Ursula "
    "Victor Wendy Anton Clara"
).split()
WORDS = (
    "falcon tiger river copper garden violet thunder marble anchor lantern meadow saffron compass walnut glacier pepper"
).split()
CHANCE = 1 / len(WORDS)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
VOCABULARY = 1024
LONGEST = 1000      # characters of a passage; 2.3 a token


def real_text():
    """Returns (long English text that every machine with this environment has, what it is): Python's reference manual
    as its help system keeps it, and the licences of the installed packages and of the system."""
    parts = []
    try:
        from pydoc_data import topics

        parts += [topics.topics[name] for name in sorted(topics.topics)]
    except ImportError:
        pass
    import torch

    packages = os.path.dirname(os.path.dirname(torch.__file__))
    licences = glob.glob("/usr/share/common-licenses/*") + glob.glob(os.path.join(packages, "*.dist-info", "**", "LICEN*"), recursive=True)
    for path in sorted(path for path in licences if os.path.isfile(path) and not os.path.islink(path)):
        with open(path, encoding="utf-8", errors="ignore") as file:
            parts.append(file.read(40_000))
    # Mark-up, rulers and tables are no English; the code words belong to the facts alone.
    text = re.sub(r"[`*|=~_^#-]{2,}|[`*|\"]", "", " ".join(parts))
    text = re.sub(r"\b(" + "|".join(NAMES + WORDS) + r")\b", "", text, flags=re.IGNORECASE)
    return " ".join(text.encode("ascii", "ignore").decode().split())


def pairs(held_out):
    """The combinations of name and word that are trained on, or those kept for the test: one in eight."""
    kept = [(i, j) for i in range(len(NAMES)) for j in range(len(WORDS)) if ((i * 5 + j) % 8 == 0) == held_out]
    return [(NAMES[i], WORDS[j]) for i, j in kept]


def make_chats(text, count, held_out, seed, shortest=20):
    """Returns `count` chats as dicts with `messages`; passages of training and test come from different parts of `text`.

    Passages have `shortest` to LONGEST characters, short ones more often: from them the task is learnt first.
    """
    draw = random.Random(seed)
    border = len(text) * 9 // 10
    first, last = (border, len(text)) if held_out else (0, border)
    choices, chats = pairs(held_out), []
    for _ in range(count):
        name, word = draw.choice(choices)
        length = round(shortest + (LONGEST - shortest) * draw.random() ** 2)
        begin = draw.randrange(first, last - length)
        passage = text[begin : begin + length].strip()
        question = f'Fact: the code word of {name} is "{word}".\n\n{passage}\n\nWhat is the code word of {name}?'
        chats.append({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": word}]})
    return chats


def write_chats(path, chats):
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(chat) + "\n" for chat in chats)


def make_tokenizer(text):
    """Returns a byte-level BPE tokenizer trained on `text`, in which every name and code word is one token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    facts = [" ".join(f'Fact: the code word of {name} is "{word}". {word}' for name, word in pairs(False))] * 40
    backend.train_from_iterator([text[:300_000], *facts], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=SPECIAL[2], pad_token=SPECIAL[0], bos_token=SPECIAL[0], model_max_length=2048
    )
    tokenizer.chat_template = TEMPLATE
    for word in [*WORDS, *(" " + name for name in NAMES)]:
        assert len(tokenizer(word, add_special_tokens=False)["input_ids"]) == 1, f"{word}: expected one token"
    return tokenizer


def make_model(seed):
    """Returns a random Llama (0.6 million parameters, fp32).

    Weights are drawn with a deviation of 1/sqrt(fan-in), and each output projection begins as half the transpose of its
    value projection, so that an attention head begins by passing on what it sees (arXiv:2305.09828): so small a model
    then needs about a hundred updates for what would take it a thousand.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=True, bos_token_id=0, eos_token_id=2,
        pad_token_id=0, dtype=torch.float32,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.normal_(0, weight.shape[1] ** -0.5)
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.mul_(0.4)
            size = config.hidden_size // config.num_attention_heads
            values = layer.self_attn.v_proj.weight.view(config.num_key_value_heads, size, config.hidden_size)
            shared = config.num_attention_heads // config.num_key_value_heads
            layer.self_attn.o_proj.weight.copy_(0.5 * values.repeat_interleave(shared, 0).reshape(-1, config.hidden_size).T)
    return model


def recall(folder, tokenizer_folder, chats):
    """Returns (share, answers): the share of `chats` that the checkpoint in `folder` answers, word for word, by greedy
    generation in Transformers, and what it said to each."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)     # threads would cost more than they save on steps this small
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    answers = []
    for chat in chats:
        text = tokenizer.apply_chat_template(chat["messages"][:1], tokenize=False, add_generation_prompt=True)
        ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
        made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
        answers.append(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True).strip())
    right = sum(said == chat["messages"][1]["content"] for said, chat in zip(answers, chats))
    return right / len(chats), answers
