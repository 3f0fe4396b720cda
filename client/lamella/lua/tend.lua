-- The reconciler's care for one model: users whose limit was raised wait in line again, and what may be sent is sent.
-- A model without jobs is taken off the list.
-- KEYS queues     ARGV prefix, ttl_s, model
-- Returns jobs sent
local HELD = 100  -- users looked at in one call
local model, now = ARGV[3], now_ms()
for _, class in ipairs(CLASSES) do
  for _, user in ipairs(redis.call('ZRANGE', users('held', model, class), 0, HELD - 1)) do
    if not is_at_limit(model, user, limits_of(user).running) then let_go_on(model, class, user) end
  end
end
local sent = dispatch(model, 1000, now)
local is_empty = redis.call('EXISTS', flight(model)) == 0
for _, class in ipairs(CLASSES) do
  is_empty = is_empty and redis.call('EXISTS', users('ready', model, class), users('held', model, class)) == 0
end
if is_empty then redis.call('SREM', KEYS[1], model) end
return sent
