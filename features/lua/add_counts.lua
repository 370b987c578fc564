-- Add the counts of a stretch of one partition to its hourly tiles, all of them or nothing.
-- KEYS[1] the partition's marks (hash): "mark:source" is the next offset to be counted, and the
--         number of an hour the offset after which its tile last changed
-- KEYS[2], KEYS[3], ... the tiles (hash): 16 bytes of domain and item -> events
-- ARGV[1] the mark's field    ARGV[2] the mark the counts were made from, empty when there is none
-- ARGV[3] the mark after them
-- then for each tile: hour, when it may go (s since 1970), number of pairs, field, count, ...
-- Returns 1 when added, 0 when the mark differs: somebody else has counted.
if (redis.call('HGET', KEYS[1], ARGV[1]) or '') ~= ARGV[2] then
  return 0
end
local at = 4
for tile = 2, #KEYS do
  local hour, goes_s, pairs_left = ARGV[at], ARGV[at + 1], tonumber(ARGV[at + 2])
  at = at + 3
  for _ = 1, pairs_left do
    redis.call('HINCRBY', KEYS[tile], ARGV[at], ARGV[at + 1])
    at = at + 2
  end
  redis.call('EXPIREAT', KEYS[tile], goes_s)
  redis.call('HSET', KEYS[1], hour, ARGV[3])
end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[3])
return 1
