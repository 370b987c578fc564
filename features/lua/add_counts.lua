-- Add the counts of a stretch of one partition to its hourly tiles, and replace what follows the
-- items that were followed in it, all of it or nothing.
-- KEYS[1] the partition's marks (hash): "mark:source" is the next offset to be counted, and the
--         number of an hour the offset after which its tile last changed
-- KEYS[2] the partition's items whose followers changed (sorted set): item -> the mark since
-- KEYS[3], ... the tiles (hash): 16 bytes of domain and item -> events; then followers (string)
-- ARGV[1] the mark's field    ARGV[2] the mark the counts were made from, empty when there is none
-- ARGV[3] the mark after them    ARGV[4] how many tiles    ARGV[5] seconds that followers are kept
-- then for each tile: hour, when it may go (s since 1970), number of pairs, field, count, ...
-- then for each item followed: the item, its followers as features/followers.py packs them
-- Returns 1 when added, 0 when the mark differs: somebody else has counted.
if (redis.call('HGET', KEYS[1], ARGV[1]) or '') ~= ARGV[2] then
  return 0
end
local tiles = tonumber(ARGV[4])
local at = 6
for tile = 3, 2 + tiles do
  local hour, goes_s, pairs_left = ARGV[at], ARGV[at + 1], tonumber(ARGV[at + 2])
  at = at + 3
  for _ = 1, pairs_left do
    redis.call('HINCRBY', KEYS[tile], ARGV[at], ARGV[at + 1])
    at = at + 2
  end
  redis.call('EXPIREAT', KEYS[tile], goes_s)
  redis.call('HSET', KEYS[1], hour, ARGV[3])
end
for followed = 3 + tiles, #KEYS do
  redis.call('SET', KEYS[followed], ARGV[at + 1], 'EX', ARGV[5])
  redis.call('ZADD', KEYS[2], ARGV[3], ARGV[at])
  at = at + 2
end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[3])
return 1
