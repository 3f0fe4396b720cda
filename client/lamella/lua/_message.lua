-- The Celery message that tells a worker of a job: what Celery itself would put on a Redis list (its message protocol 2
-- inside kombu's virtual transport). It carries the job's id and, in its headers, the trace of who asked for it; nothing
-- else. Each sending has a delivery tag of its own.
local ALPHABET = 'ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/'

-- Base64 of a text whose length is a multiple of three.
local function base64(text)
  local out, floor, sub = {}, math.floor, string.sub
  for at = 1, #text, 3 do
    local a, b, c = string.byte(text, at, at + 2)
    local bits = a * 65536 + b * 256 + c
    local w, x, y, z = floor(bits / 262144), floor(bits / 4096) % 64, floor(bits / 64) % 64, bits % 64
    out[#out + 1] = sub(ALPHABET, w + 1, w + 1) .. sub(ALPHABET, x + 1, x + 1) .. sub(ALPHABET, y + 1, y + 1)
      .. sub(ALPHABET, z + 1, z + 1)
  end
  return table.concat(out)
end

-- Base64 of what follows the arguments, the same in every message:
-- ], {}, {"callbacks": null, "errbacks": null, "chain": null, "chord": null}]
local AFTER_ID = 'XSwge30sIHsiY2FsbGJhY2tzIjogbnVsbCwgImVycmJhY2tzIjogbnVsbCwgImNoYWluIjogbnVsbCwgImNob3JkIjogbnVsbH1d'

local function celery_message(job_id, model, sends)
  local id = cjson.encode(job_id)
  local trace = redis.call('HGET', record(job_id), 'trace')
  -- Spaces before the id bring its end to a multiple of three.
  local body = base64('[[' .. string.rep(' ', (1 - #id) % 3) .. id) .. AFTER_ID
  return table.concat({
    '{"body": "', body, '", "content-encoding": "utf-8", "content-type": "application/json", "headers": {"lang": "py", ',
    '"task": "lamella.generate", "id": ', id, ', "shadow": null, "eta": null, "expires": null, "group": null, ',
    '"group_index": null, "retries": 0, "timelimit": [null, null], "root_id": ', id, ', "parent_id": null, ',
    '"argsrepr": ', cjson.encode("('" .. job_id .. "',)"), ', "kwargsrepr": "{}", "origin": "lamella-client", ',
    '"ignore_result": true, "replaced_task_nesting": 0, "stamped_headers": null, "stamps": {}',
    trace and ', "traceparent": ' .. cjson.encode(trace) or '', '}, ',
    '"properties": {"correlation_id": ', id, ', "reply_to": ', id, ', "delivery_mode": 2, ',
    '"delivery_info": {"exchange": "", "routing_key": ', cjson.encode('generate.' .. model), '}, "priority": 0, ',
    '"body_encoding": "base64", "delivery_tag": ', cjson.encode(job_id .. '.' .. string.format('%d', sends)), '}}'})
end
