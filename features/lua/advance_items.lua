-- Say up to where a partition of the items topic is applied, if it stands where the writer left it.
-- KEYS[1] the positions (hash)    ARGV[1] partition    ARGV[2] expected offset    ARGV[3] new one
-- Returns 1 when written, 0 when it stands elsewhere: Redis went back, or another worker wrote.
if (redis.call('HGET', KEYS[1], ARGV[1]) or '0') ~= ARGV[2] then
  return 0
end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[3])
return 1
