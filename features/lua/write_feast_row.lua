-- Write an entity's values of one Feast view unless newer or equally old ones are there.
-- KEYS[1] the entity's hash, as Feast's own Redis store has it
-- ARGV[1] the field of the view's event time    ARGV[2] seconds, ARGV[3] nanoseconds of the new one
-- ARGV[4] seconds after which the whole entity expires, 0: never
-- ARGV[5] 1: compare, 0: write whatever is there
-- then field, bytes, field, bytes, ... with the event time's among them
-- Returns 1 when written, 0 when what is stored is not older.
local function event_time(bytes)
  -- A protobuf Timestamp: numbered varints, 1 the seconds, 2 the nanoseconds.
  local found = { 0, 0 }
  local at = 1
  while at <= #bytes do
    local number = math.floor(bytes:byte(at) / 8)
    local value, scale, size = 0, 1, 0
    repeat
      at = at + 1
      size = size + 1
      if size <= 7 then
        value = value + bytes:byte(at) % 128 * scale
        scale = scale * 128
      end
    until bytes:byte(at) < 128
    -- Ten bytes are a number below zero: a date before 1970.
    found[number] = size == 10 and value - scale or value
    at = at + 1
  end
  return found[1], found[2]
end

if ARGV[5] == '1' then
  local stored = redis.call('HGET', KEYS[1], ARGV[1])
  if stored then
    local seconds, nanos = event_time(stored)
    local new_seconds = tonumber(ARGV[2])
    if new_seconds < seconds or (new_seconds == seconds and tonumber(ARGV[3]) <= nanos) then
      return 0
    end
  end
end
redis.call('HSET', KEYS[1], unpack(ARGV, 6))
if ARGV[4] ~= '0' then
  redis.call('EXPIRE', KEYS[1], ARGV[4])
end
return 1
