-- Replace what is live, unless somebody with a greater token has done so.
-- KEYS[1] the pointers (hash)    ARGV[1] the token    ARGV[2], ARGV[3], ... its fields and values
-- Returns -1 when written, else the greater token that is held.
local held = tonumber(redis.call('HGET', KEYS[1], 'token') or '0')
if held > tonumber(ARGV[1]) then
  return held
end
redis.call('DEL', KEYS[1])
redis.call('HSET', KEYS[1], 'token', ARGV[1], unpack(ARGV, 2))
return -1
