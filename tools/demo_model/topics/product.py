"""What vllm-lite is: its packages, commands, flags, endpoints and concepts."""

from __future__ import annotations

from random import Random
from typing import NamedTuple

from phrasing import Conversation, Phrasings, ask, casual


class Fact(NamedTuple):
    """Questions with one meaning, answers that are all right, and the words none of them lacks."""

    questions: tuple[str, ...]
    answers: tuple[str, ...]
    keywords: tuple[str, ...]


WHAT_IS = (
    "What is {x}?", "What's {x}?", "Explain {x}.", "What does {x} mean?", "Tell me about {x}.",
    "Define {x}.", "Can you explain {x}?", "Please explain {x} to me.", "How would you describe {x}?",
    "I want to know what {x} is.", "Give me a short explanation of {x}.", "{x}?", "Describe {x}.",
    "What do you know about {x}?", "Could you tell me what {x} is?", "What exactly is {x}?",
    "Help me understand {x}.", "What is meant by {x}?", "In one sentence, what is {x}?",
    "I do not understand {x}. What is it?", "Explain {x} in simple words.", "What is {x} good for?",
    "Why do we need {x}?", "What is {x} in an inference engine?",
)  # fmt: skip

CONCEPTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "a paged KV cache|paged KV cache|the paged KV cache|paged attention": (
        ("A paged KV cache stores keys and values in blocks of fixed size. Each sequence has a block table that lists its blocks, so memory is never fragmented.",
         "The paged KV cache keeps the keys and values of every token in fixed-size blocks. A block table says which blocks belong to a sequence, so no memory is wasted."),
        ("block",)),
    "the KV cache|KV cache|a KV cache": (
        ("The KV cache holds the keys and values of all earlier tokens, so that each new token needs only one step. vllm-lite keeps it in blocks.",
         "The KV cache keeps keys and values of earlier tokens so that they are computed only once. In vllm-lite it is divided into blocks."),
        ("keys", "values")),
    "a block|a KV block|blocks": (
        ("A block is KV memory for a fixed number of positions, 16 by default on a CPU. Blocks are allocated on demand and shared through the prefix cache.",
         "A block holds the keys and values of a fixed number of positions. On a CPU a block has 16 positions by default."),
        ("positions",)),
    "a block table|the block table|block tables": (
        ("A block table lists the blocks of a sequence in order. Attention follows it to find the keys and values of each position.",
         "The block table says which blocks hold the keys and values of a sequence, in order of position."),
        ("blocks", "sequence")),
    "continuous batching|batching": (
        ("Continuous batching means that requests join and leave the batch at every step. Nobody waits for a whole batch to finish.",
         "With continuous batching a new request joins the running batch at the next step, and a finished one leaves at once."),
        ("batch", "step")),
    "chunked prefill|prompt chunking": (
        ("Chunked prefill splits a long prompt into chunks that share each step with running decodes, so a long prompt does not stall other streams.",
         "Chunked prefill computes a long prompt in pieces. Each step has a token budget: decodes go first and chunks of prompts fill the rest."),
        ("prompt",)),
    "a decode|decode|decoding": (
        ("A decode computes one new token of a running sequence. Decodes go first in every step.",
         "Decoding produces the next token of a sequence. In vllm-lite running decodes are served first in each step."),
        ("token",)),
    "prefill": (
        ("Prefill computes the keys and values of the prompt before the first token is sampled.",
         "Prefill is the work on the prompt: its keys and values are computed and stored in blocks."),
        ("prompt",)),
    "the prefix cache|prefix caching|prefix cache|a prefix cache": (
        ("The prefix cache keeps the blocks of earlier prompts. A request that begins with the same tokens reuses them instead of computing them again.",
         "Prefix caching finds blocks with the same content by a chained hash, so equal prompt beginnings are computed only once."),
        ("same",)),
    "preemption|preempting a request": (
        ("Preemption takes the blocks of a sequence when memory runs out. The sequence starts again later and continues with the same text.",
         "When no block is free, the newest sequence is preempted: its blocks are released and it is recomputed later."),
        ("blocks",)),
    "the token budget|a token budget|max-num-batched-tokens": (
        ("The token budget is the number of tokens that one step may compute. Decodes use it first and prompts share the rest.",
         "Each step has a token budget. Running decodes are served first, then chunks of prompts fill the budget."),
        ("step",)),
    "the scheduler|scheduling": (
        ("The scheduler decides which sequence computes which tokens in the next step. It lives in vllm_core and needs no torch.",
         "The scheduler plans every step: decodes first, then chunks of prompts under a token budget. It is part of vllm_core."),
        ("step", "vllm_core")),
    "speculative decoding|speculation": (
        ("Speculative decoding guesses several tokens with a small draft model and checks them in one step of the large model. The text stays the same.",
         "In speculative decoding a draft is guessed cheaply and verified in a single step, so several tokens can be accepted at once."),
        ("draft",)),
    "a draft model|the draft model|draft models": (
        ("A draft model is a small model with the same vocabulary that guesses tokens for speculative decoding.",
         "The draft model is small and fast. It proposes tokens that the large model verifies in one step."),
        ("model",)),
    "TTFT|time to first token": (
        ("TTFT is the time to the first token: from the request until the first token arrives.",
         "TTFT means time to first token. It shows how long a user waits before the answer begins."),
        ("first token",)),
    "ITL|inter-token latency": (
        ("ITL is the inter-token latency: the gap between two tokens of a stream.",
         "ITL means inter-token latency, the time between one token and the next."),
        ("token",)),
    "throughput": (
        ("Throughput is the number of tokens per second over all requests.",
         "Throughput counts how many tokens per second the server produces for all requests together."),
        ("tokens per second",)),
    "tensor parallelism|tensor parallel": (
        ("Tensor parallelism splits each layer of a model over several devices that work together on every step.",
         "With tensor parallelism every device holds a part of each layer, so a model that is too large for one device still fits."),
        ("layer", "device")),
    "streaming|SSE|a stream": (
        ("Streaming sends each piece of the answer as soon as it exists, as server-sent events. Set stream to true in the request.",
         "With streaming the tokens arrive one by one as server-sent events. Add \"stream\": true to the request."),
        ("stream",)),
    "temperature|the temperature": (
        ("Temperature controls randomness. 0 always takes the most likely token, higher values give more varied text.",
         "The temperature scales randomness: 0 is greedy and repeatable, values near 1 are more creative."),
        ("0",)),
    "top-p|top_p|nucleus sampling": (
        ("Top-p keeps the smallest set of tokens whose probability reaches p, and samples from it.",
         "With top-p only the most likely tokens that together reach probability p can be sampled."),
        ("probability",)),
    "top-k|top_k": (
        ("Top-k keeps only the k most likely tokens before sampling.",
         "With top-k the next token is sampled from the k most likely ones."),
        ("most likely",)),
    "an embedding|embeddings": (
        ("An embedding is a vector that stands for the meaning of a text. Post the text to /v1/embeddings to get one.",
         "Embeddings turn text into vectors. vllm-lite serves them at /v1/embeddings."),
        ("vector", "/v1/embeddings")),
    "a session|session_id|a session_id": (
        ("A session_id pins the cached blocks of a conversation, so that the next turn starts faster. Start the server with --context-cache.",
         "With --context-cache and a session_id the blocks of a conversation stay in the cache between its turns."),
        ("blocks",)),
    "quantization|a quantized model": (
        ("Quantization stores weights with fewer bits, such as 8 or 4. The model needs less memory and decodes faster.",
         "A quantized model keeps its weights in 8 or 4 bits, which saves memory and time."),
        ("bits", "memory")),
    "a token|tokens": (
        ("A token is a piece of text, often a part of a word. Models read and write tokens.",
         "A token is a small piece of text. A tokenizer splits text into tokens."),
        ("text",)),
    "a tokenizer|the tokenizer|tokenization": (
        ("A tokenizer splits text into tokens and turns tokens back into text.",
         "The tokenizer turns text into token ids and back."),
        ("text",)),
    "a chat template|the chat template": (
        ("A chat template turns a list of messages into the prompt that the model was trained on.",
         "The chat template renders messages as text with roles, so that the model sees the format it knows."),
        ("messages",)),
    "the context length|context length|max-model-len": (
        ("The context length is the longest sequence of prompt and completion in tokens. Set it with --max-model-len.",
         "The context length limits prompt and completion together. The flag is --max-model-len."),
        ("--max-model-len",)),
    "a ModelBackend|ModelBackend|the ModelBackend protocol": (
        ("ModelBackend is the one protocol between the engine and a model: info, stores, forward and close.",
         "A ModelBackend runs batches of a model. It has info, stores, forward and close, and everything else in vllm-lite talks to it."),
        ("forward",)),
    "vllm_core|the core package": (
        ("vllm_core holds the scheduler, the paged KV cache and the engine loop. It needs only the standard library.",
         "The package vllm_core schedules requests and keeps account of KV blocks. It does not import torch."),
        ("vllm_core",)),
    "vllm_traits|the traits package": (
        ("vllm_traits holds the ModelBackend protocol and the plain data that crosses it.",
         "The package vllm_traits defines the protocol between engine and model. All other packages depend on it."),
        ("vllm_traits", "protocol") ),
    "vllm_models|the models package": (
        ("vllm_models holds the architectures, weights and kernels. It is the package that uses torch.",
         "The package vllm_models runs models with torch: architectures, weights, sampling and kernels."),
        ("vllm_models", "torch")),
    "vllm_dist|the dist package": (
        ("vllm_dist reaches backends in other processes and on other machines.",
         "The package vllm_dist connects the engine to backends in other processes."),
        ("vllm_dist", "processes")),
    "vllm_server|the server package": (
        ("vllm_server holds the OpenAI-compatible API, the command line and the configuration.",
         "The package vllm_server speaks HTTP: the OpenAI-compatible API, metrics and the command line."),
        ("vllm_server", "API")),
    "backpressure|back-pressure": (
        ("Backpressure means that a client which reads slowly slows only its own request. Others are not affected.",
         "With backpressure a slow reader pauses its own sequence, and nobody else notices."),
        ("own",)),
    "an OpenAI-compatible server|OpenAI compatibility": (
        ("An OpenAI-compatible server answers the same requests as the OpenAI API, so any OpenAI client can talk to it.",
         "It means that every OpenAI client works: set its base URL to http://127.0.0.1:8000/v1."),
        ("OpenAI client",)),
    "Prometheus metrics|the metrics endpoint": (
        ("The server counts requests, tokens and latencies and serves them at /metrics in the Prometheus format.",
         "Prometheus can scrape /metrics. The names are the same as vLLM's, so existing dashboards work."),
        ("/metrics",)),
}  # fmt: skip

ABOUT = Fact(
    ("What is vllm-lite?", "What's vllm-lite?", "Tell me about vllm-lite.", "Explain vllm-lite.",
     "What is vllm-lite good for?", "Can you describe vllm-lite?", "What does vllm-lite do?",
     "Please explain what vllm-lite is.", "I have never heard of vllm-lite. What is it?",
     "Give me a short description of vllm-lite.", "What kind of software is vllm-lite?",
     "vllm-lite?", "Describe vllm-lite in one sentence.", "Why should I use vllm-lite?",
     "What is this project?", "What is vllm-lite about?", "Could you tell me what vllm-lite is?",
     "What can I do with vllm-lite?", "How would you explain vllm-lite to a friend?",
     "Do you know vllm-lite?", "So, what is vllm-lite?", "What exactly is vllm-lite?",
     "In a few words, what is vllm-lite?", "What do you know about vllm-lite?"),
    ("vllm-lite is a small, readable LLM inference engine in Python with an OpenAI-compatible server. It has continuous batching, a paged KV cache and a prefix cache.",
     "vllm-lite is an LLM inference engine written in Python, small enough to read in an afternoon. It serves models through an OpenAI-compatible API.",
     "vllm-lite is a small LLM inference engine in Python. It runs language models with continuous batching and a paged KV cache, and any OpenAI client can talk to it."),
    ("inference engine", "Python", "OpenAI"),
)  # fmt: skip

FACTS: tuple[Fact, ...] = (
    Fact(
        ("How do I start the server?", "How can I start the server?", "How do I run the server?",
         "How to start vllm-lite?", "How do I start vllm-lite?", "What command starts the server?",
         "Start the server, how?", "How do I launch the server?", "How can I run vllm-lite?",
         "Which command starts vllm-lite?", "Please tell me how to start the server.",
         "How do I serve the model?", "What do I type to start the server?", "Show me how to run the server.",
         "How do I get the server running?", "I want to start the server.", "How do I begin?",
         "How do I use vllm-lite?", "How do I bring up the API server?", "what is the command to serve a model?"),
        ("Run `python3 -m pip install hatch && hatch run serve`. The server listens on 127.0.0.1:8000.",
         "Start it with `hatch run serve`. It serves the embedded model on 127.0.0.1:8000.",
         "Type `hatch run serve`, and the server answers on 127.0.0.1:8000."),
        ("hatch run serve", "127.0.0.1:8000")),
    Fact(
        ("How do I run the tests?", "How can I run the tests?", "What command runs the tests?", "How to test vllm-lite?",
         "How do I test the project?", "How do I start the test suite?", "Show me how to run the tests.",
         "Which command passes the tests?", "I want to run the tests.", "Please tell me how to run the test suite.",
         "How do I check that everything works?"),
        ("Run `hatch run test`.", "Run the tests with `hatch run test`.", "The command is `hatch run test`."),
        ("hatch run test",)),
    Fact(
        ("How do I chat with the model?", "How do I start a chat?", "Is there a chat command?", "How can I chat in the terminal?",
         "What command opens a chat?", "How do I talk to the model?", "Can I chat on the command line?",
         "Show me how to start a chat.", "I want to chat with the model in my terminal."),
        ("Run `hatch run chat`, or `vllm-lite chat --model PATH` for another model.",
         "Use `hatch run chat`. It opens a chat in the terminal."),
        ("hatch run chat",)),
    Fact(
        ("How do I generate text?", "How can I generate text from the command line?", "Is there a generate command?",
         "How do I complete a prompt?", "What command generates text?", "Show me how to generate text.",
         "How do I generate a completion without a server?", "I want to generate some text."),
        ('Run `hatch run generate "Once upon a time"`. It writes the completion to the terminal.',
         'Use `vllm-lite generate "your prompt"`. The text is streamed to the terminal.'),
        ("generate",)),
    Fact(
        ("How do I start it on another port?", "How do I change the port?", "How can I use a different port?", "Which flag sets the port?",
         "What does --port do?", "How do I set the port?", "Can the server listen on port 9000?", "The port 8000 is in use. What now?",
         "How do I run the server on port 8080?", "Show me how to choose the port.", "I need another port.",
         "What is the default port?", "Which port does the server use?", "Can I change the port number?", "How to use port 9000?"),
        ("The default port is 8000. Use `--port` to change it, for example `vllm-lite serve --port 9000`.",
         "Add `--port`, for example `vllm-lite serve --port 9000`. The default is 8000."),
        ("--port",)),
    Fact(
        ("How do I change the host?", "What does --host do?", "How can I listen on all interfaces?", "Which flag sets the address?",
         "How do I make the server reachable from other machines?", "How do I set the host?", "Can I bind to 0.0.0.0?",
         "Show me how to change the address."),
        ("Use `--host`, for example `vllm-lite serve --host 0.0.0.0`. Set an API key when other machines can reach it.",
         "The flag is `--host`. With `--host 0.0.0.0` other machines can reach the server, so set an API key too."),
        ("--host", "key")),
    Fact(
        ("How do I load another model?", "How do I use my own model?", "What does --model do?", "How can I serve a different model?",
         "How do I serve a real model?", "Which flag chooses the model?", "How do I run Qwen3?", "How do I serve Llama?",
         "Can I use a model from the Hub?", "How do I load a checkpoint?", "Show me how to choose a model.",
         "I want a bigger model.", "How do I change the model?", "Can you run other models?", "How to load a model from a folder?"),
        ("Use `--model` with a folder or a Hub id, for example `vllm-lite serve --model Qwen/Qwen3-0.6B`.",
         "Pass it with `--model`: `vllm-lite serve --model PATH`. A folder or a Hub id works."),
        ("--model",)),
    Fact(
        ("How do I set an API key?", "How do I protect the server?", "What does --api-key do?", "How can I require a key?",
         "Does the server have authentication?", "How does authentication work?", "How do I use an API key?",
         "Which variable holds the API key?", "Show me how to set a key.", "How do I make the server safe?",
         "Can I require a password?"),
        ("Set `--api-key` or the variable VLLM_API_KEY. Clients then send the key as a bearer token.",
         "Start with `--api-key your-key` or set VLLM_API_KEY. Requests without the key get status 401."),
        ("--api-key", "VLLM_API_KEY")),
    Fact(
        ("How do I set the number of KV blocks?", "What does --num-blocks do?", "How many KV blocks are there?", "How do I limit the KV cache?",
         "Which flag sets the KV blocks?", "How can I use less memory for the KV cache?", "How large is the KV cache?",
         "Show me how to set the number of blocks."),
        ("Use `--num-blocks`. Without it, as many KV blocks are allocated as fit in memory.",
         "The flag `--num-blocks` sets the number of KV blocks. By default it is chosen from the free memory."),
        ("--num-blocks", "memory")),
    Fact(
        ("How many requests can run at once?", "What does --max-num-seqs do?", "How do I limit concurrency?", "Which flag limits the number of sequences?",
         "How many users can be served at the same time?", "How do I change the number of concurrent requests?",
         "Can several people use the server at once?"),
        ("`--max-num-seqs` sets how many sequences run at once. More requests wait in the queue.",
         "Use `--max-num-seqs` to set how many sequences run at once. The others wait in the queue."),
        ("--max-num-seqs", "queue")),
    Fact(
        ("What does --dtype do?", "Which data types are supported?", "How do I choose bf16?", "How do I change the dtype?",
         "Can I use float32?", "Which flag sets the precision?", "How do I run in half precision?"),
        ("`--dtype` sets the element type: auto, bf16, f16 or f32.",
         "Use `--dtype bf16`, `--dtype f16` or `--dtype f32`. The default is auto."),
        ("--dtype", "bf16")),
    Fact(
        ("How do I use a config file?", "What does --config do?", "Can I configure it with YAML?", "How do I write a configuration?",
         "How do I start the server with a configuration file?", "Where do I put my settings?", "Is there a config file?",
         "Show me how to use a YAML file."),
        ("Run `vllm-lite-server --config config.yaml`. The file config.example.yaml shows every section.",
         "Write a YAML file and start `vllm-lite-server --config config.yaml`."),
        ("vllm-lite-server --config config.yaml",)),
    Fact(
        ("Which environment variables are there?", "What environment variables can I set?", "Can I use environment variables?",
         "List the environment variables.", "How do I configure it with variables?", "What is VLLM_MODEL?", "What is VLLM_PORT?",
         "Which variable sets the port?", "Which variable sets the model?"),
        ("The main variables are VLLM_MODEL, VLLM_PORT and VLLM_API_KEY. Flags win over them.",),
        ("VLLM_MODEL", "VLLM_PORT", "VLLM_API_KEY")),
    Fact(
        ("Which setting wins, a flag or the config file?", "What is the order of precedence?", "Do flags override the environment?",
         "What wins, the environment or YAML?", "How are settings combined?", "In which order are settings read?",
         "Does a flag beat the YAML file?"),
        ("Flags win over the environment, the environment over YAML, and YAML over the defaults.",
         "The order is flags, environment, YAML, defaults. The first one that names a setting wins."),
        ("environment", "YAML")),
    Fact(
        ("How do I see the current settings?", "What does --print-config do?", "How can I print the configuration?",
         "Which settings are in force?", "Show me how to print the settings."),
        ("`--print-config` shows each value and where it came from.",
         "Start with `--print-config`. It prints every value and its origin."),
        ("--print-config",)),
    Fact(
        ("Which endpoints are there?", "What endpoints does the server have?", "List the endpoints.", "Which API routes exist?",
         "What does the API offer?", "Which URLs can I call?", "What is in the API?", "Show me the endpoints.",
         "What can I call over HTTP?"),
        ("The main endpoints are /v1/chat/completions, /v1/completions, /v1/embeddings, /v1/models, /health and /metrics.",),
        ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/metrics")),
    Fact(
        ("How do I stop the server?", "How can I shut the server down?", "What does /shutdown do?", "How do I end the server?",
         "How do I quit?", "Is there a clean way to stop?", "Show me how to shut down."),
        ("Press Ctrl+C or post to /shutdown. Running streams finish first.",
         "Send SIGTERM, press Ctrl+C or post to /shutdown. The server lets running streams finish."),
        ("/shutdown", "streams")),
    Fact(
        ("How do I check that the server is healthy?", "What does /health do?", "Is there a health check?", "How do I know that the server is ready?",
         "Which endpoint shows the health?", "How can I monitor the health of the server?"),
        ("Ask /health. It answers 200 when the server is ready and 503 while it loads or drains.",
         "Call /health: status 200 means ready, 503 means loading or draining."),
        ("/health", "200", "503")),
    Fact(
        ("How do I use the OpenAI client?", "Can I use the openai package?", "How do I connect a client?", "What is the base URL?",
         "How do I call it from Python?", "Which base_url do I set?", "Does it work with the OpenAI client?",
         "How do I connect with an OpenAI client?", "Show me how to connect a client."),
        ("Set the base URL of your OpenAI client to http://127.0.0.1:8000/v1.",
         "Any OpenAI client works. Its base URL is http://127.0.0.1:8000/v1."),
        ("http://127.0.0.1:8000/v1",)),
    Fact(
        ("Which packages does vllm-lite have?", "What are the five packages?", "How is the project structured?", "List the packages.",
         "What is the structure of vllm-lite?", "How is the code organised?", "Name the packages of vllm-lite.",
         "Which parts does vllm-lite consist of?", "What modules are there?", "Explain the layout of the project."),
        ("There are five packages: vllm_traits, vllm_core, vllm_models, vllm_dist and vllm_server. They depend only downward.",
         "vllm-lite has five packages: vllm_traits, vllm_core, vllm_models, vllm_dist and vllm_server."),
        ("vllm_traits", "vllm_core", "vllm_models", "vllm_dist", "vllm_server")),
    Fact(
        ("What is the license?", "Which license does vllm-lite have?", "Is vllm-lite free?", "Is it open source?", "Under which license is it?",
         "Can I use it at work?", "May I change the code?"),
        ("vllm-lite is open source under the MIT license.", "The license is MIT."),
        ("MIT",)),
    Fact(
        ("Which commands are there?", "List the commands.", "What commands does vllm-lite have?", "Show me the commands.",
         "What can I do on the command line?", "Which subcommands exist?", "What are the commands of vllm-lite?"),
        ("The commands are vllm-lite serve, chat, completion, generate and bench.",
         "There are five commands: vllm-lite serve, chat, completion, generate and bench."),
        ("serve", "chat", "completion", "generate", "bench")),
    Fact(
        ("How do I measure the speed?", "Is there a benchmark?", "How do I benchmark the server?", "What does vllm-lite bench do?",
         "How can I measure throughput?", "How fast is it?", "Show me how to run a benchmark."),
        ("Run `vllm-lite bench serve` against a running server. It reports TTFT, ITL and throughput.",
         "Use `vllm-lite bench serve`. It works against any OpenAI server and prints TTFT, ITL and throughput."),
        ("vllm-lite bench serve",)),
    Fact(
        ("Do I need a GPU?", "Does it run on a CPU?", "Can I use it without a GPU?", "Does it work on my laptop?", "What hardware do I need?",
         "Is a GPU required?", "Can it run on a normal computer?"),
        ("No, a CPU is enough. You need Python 3.11 or newer and pip.",
         "It runs on a CPU. A laptop with Python 3.11 or newer is enough."),
        ("CPU", "3.11")),
    Fact(
        ("Which Python version do I need?", "What are the requirements?", "What do I need to install?", "Does it need Python 3.11?",
         "Which version of Python is required?", "What must be installed first?"),
        ("You need Python 3.11 or newer and pip. Everything else is installed by hatch.",
         "Python 3.11 or newer and pip are enough. hatch installs the rest."),
        ("3.11", "pip")),
    Fact(
        ("Which models are supported?", "What models can you run?", "Does it support Qwen3?", "Does it run Llama?", "Which architectures are there?",
         "Which model families work?", "Can it run Llama models?"),
        ("Llama and Qwen3 models run from Hugging Face safetensors. Use `--model` to choose one.",
         "vllm-lite runs Llama and Qwen3 checkpoints in the safetensors format."),
        ("Llama", "Qwen3")),
    Fact(
        ("How do I get embeddings?", "What does /v1/embeddings do?", "How do I embed a text?", "Can I compute embeddings?",
         "Which endpoint gives embeddings?", "Show me how to get an embedding."),
        ("Post the text as input to /v1/embeddings. The answer holds one vector per text.",
         "Use /v1/embeddings. It returns a vector for each input."),
        ("/v1/embeddings", "vector")),
    Fact(
        ("How do I stream the answer?", "Can I get tokens one by one?", "How do I turn on streaming?", "Does it support streaming?",
         "How do I receive a stream?", "What does stream do?"),
        ('Add "stream": true to the request. The tokens arrive as server-sent events.',
         'Set "stream": true, and each token is sent as a server-sent event.'),
        ("stream", "true")),
    Fact(
        ("How do I add a model architecture?", "How can I add a new model?", "How do I support another architecture?",
         "What must I write to add a model?", "Show me how to add an architecture."),
        ("Write one file with the architecture, register it in one line and add one row to the parity test. The guide is docs/add-a-model.md.",),
        ("one file", "docs/add-a-model.md")),
    Fact(
        ("How do I write my own backend?", "Can I embed the scheduler?", "How can I use vllm_core alone?", "How do I add a backend?",
         "Can I use the engine without torch?", "How do I embed the engine in my program?"),
        ("Import vllm_core and pass it a class with info, stores, forward and close. No torch is needed.",
         "A backend is one class with info, stores, forward and close. Give it to vllm_core.Engine; torch is not needed."),
        ("forward", "torch")),
    Fact(
        ("What does --max-model-len do?", "How do I set the context length?", "How long can a prompt be?", "How do I change the maximum length?",
         "Which flag sets the context length?", "My prompt is too long. What can I do?"),
        ("`--max-model-len` sets the longest sequence, prompt and completion together.",
         "Set it with `--max-model-len`. Prompt and completion together must fit."),
        ("--max-model-len",)),
    Fact(
        ("What does --block-size do?", "How do I set the block size?", "How large is a block?", "Which block sizes are allowed?",
         "How many positions does a block have?"),
        ("`--block-size` sets the positions per KV block: 16, 32, 64 or 128. On a CPU the default is 16.",
         "The block size is 16 on a CPU. Change it with `--block-size`."),
        ("--block-size", "16")),
    Fact(
        ("What happens when the queue is full?", "What if there are too many requests?", "What does status 503 mean?", "Why do I get a 503?",
         "What does the server do under overload?"),
        ("When the queue is full the server answers 503 with a Retry-After header. Try again later.",
         "The server answers 503 and says when to retry. Running requests are not affected."),
        ("503",)),
    Fact(
        ("What does status 429 mean?", "Is there a rate limit?", "How do rate limits work?", "How do I set a rate limit?", "Why do I get a 429?"),
        ("Each key may send rate_limit_requests in rate_limit_window_secs. More are answered with 429.",
         "A 429 means that the rate limit of your key is reached. Set it with rate_limit_requests and rate_limit_window_secs."),
        ("429", "rate_limit_requests")),
)  # fmt: skip

SYSTEMS = ("", "", "", "", "You are a helpful assistant.", "You are vllm-lite-demo.", "Answer briefly.",
           "You are a friendly assistant.", "You are an expert on vllm-lite.")  # fmt: skip
OPENERS = (
    "",
    "",
    "",
    "",
    "",
    "",
    "Hi! ",
    "Hello, ",
    "Please help: ",
    "Question: ",
    "Hey, ",
    "Quick question: ",
)


def generate(rng: Random, phrasings: Phrasings) -> Conversation:
    """One question about the product."""
    roll = rng.random()
    if roll < 0.12:
        fact, question = ABOUT, phrasings.pick(ABOUT.questions)
    elif roll < 0.6:
        fact = rng.choice(FACTS)
        question = phrasings.pick(fact.questions)
    else:
        names, (answers, keywords) = rng.choice(list(CONCEPTS.items()))
        fact = Fact((), answers, keywords)
        question = phrasings.pick(WHAT_IS).format(x=rng.choice(names.split("|")))
        question = question[0].upper() + question[1:]
    opener = rng.choice(OPENERS) if phrasings.split == "train" else ""
    question = casual(rng, opener + question)
    answer = rng.choice(fact.answers)
    return Conversation(
        "product", ask(question, answer, rng.choice(SYSTEMS)), keywords=fact.keywords
    )
