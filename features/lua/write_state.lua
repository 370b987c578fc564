-- Write one user's state if, and only if, it still stands where the change was computed from.
-- KEYS[1] the user's row            KEYS[2] the user's waiting chunks (hash)
-- ARGV[1] expected position bytes, empty when no row is expected
-- ARGV[2] bytes of the old row to keep, -1 to replace it
-- ARGV[3] bytes to write            ARGV[4] where the position starts, counted from the row's end
-- ARGV[5...] chunk number, chunk records, ...
-- Returns 1 when written, 0 when refused.
local row = KEYS[1]
local expected = ARGV[1]
local from_end = tonumber(ARGV[4])
local held = ''
if redis.call('STRLEN', row) > 0 then
  held = redis.call('GETRANGE', row, -from_end, -from_end + 15)
end
if held ~= expected then
  return 0
end
local keep = tonumber(ARGV[2])
if keep < 0 then
  redis.call('SET', row, ARGV[3])
else
  redis.call('SETRANGE', row, keep, ARGV[3])
end
if #ARGV > 4 then
  redis.call('HSET', KEYS[2], unpack(ARGV, 5))
end
return 1
