-- The Celery message that tells a worker of a job: what Celery itself would put on a Redis list (its message protocol 2
-- inside kombu's virtual transport). It carries the job's id and, in its headers, the trace of who asked for it; nothing
-- else. Each sending has a delivery tag of its own.
local ALPHABET = 'ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/'

local function base64(text)
  local out = {}
  for at = 1, #text, 3 do
    local a, b, c = string.byte(text, at, at + 2)
    local bits = a * 65536 + (b or 0) * 256 + (c or 0)
    for place = 3, 0, -1 do
      local digit = math.floor(bits / 64 ^ place) % 64
      local is_padding = (place == 1 and not b) or (place == 0 and not c)
      out[#out + 1] = is_padding and '=' or string.sub(ALPHABET, digit + 1, digit + 1)
    end
  end
  return table.concat(out)
end

local function celery_message(job_id, model, sends)
  local id = cjson.encode(job_id)
  local trace = redis.call('HGET', record(job_id), 'trace')
  local body = base64('[[' .. id .. '], {}, {"callbacks": null, "errbacks": null, "chain": null, "chord": null}]')
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
