"""Lamella's HTTP gateway: the OpenAI API in front of the job queue, so that its clients change only address and key.

Files in the order in which a request flows through them:

- `cli`: ``lamella serve``; `settings`: what it was started with; `app`: routes, and where errors become answers
- `service`: what all requests share; `model_list`, `open_streams`: two of its parts; `metrics`: the gateway's counters
- `desk`: what files and batches share
- `body`: bytes to a checked request, mistakes named by field; `request_base`, `message_text`: what requests share
- `access`: whose request it is; `api_keys`: what a key may do; `meter`: quotas and bills; `settler`: books what ended
- `models`, `chat`, `completions`, `embeddings`, `responses`, `files`, `batches`, `health`, `documents`: the routes, a
  noun each
- `chat_request`, `completion_request`, `embedding_request`, `response_request`, `batch_request`, `upload_form`,
  `page_query`: what is accepted; parts of it: `input_item`, `answer_format`, `tool_request`
- `order`: the jobs a request asks for; `repeats`: those of a request that was sent before
- `generation`: jobs of one request, submitted, followed together, cancelled; `answer`: what one of them brings
- `live_board`, `follower`: all streams over one subscription
- `owned_place`: whose files lie where; `file_store`, `batch_store`: both kinds on the disk; `batch_record`: one batch
- `batch_keeper`, `batch_execution`: who runs a batch, and its way to the end; `batch_check`, `batch_models`,
  `line_form`: its lines as requests; `billed_submit`: their jobs, paid for
- `logprobs`, `chat_shapes`, `completion_shapes`, `response_shapes`, `response_events`, `file_shapes`, `batch_shapes`:
  what goes back
- `fleet_routes`, `job_routes`: how the service stands, and its jobs; `job_list`: which; `fleet_shapes`: as what
- `page_routes`: the files of ``ui/``, a web page in front of all this
- `response_record`: what is remembered of a response; `starting_point`: from which event on it is streamed
- `live_response`: answers that keep their connection alive, and notice when it is gone
- `api_error`: every error as OpenAI's envelope; `openapi`: the description of all this
- `keys_cli`: ``lamella keys``

It holds nothing that a restart loses: jobs, responses, keys and bills lie in Redis, files and batches on its disk. It
imports `lamella` alone.
"""
