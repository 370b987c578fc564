-- Forget that items' followers changed, unless they have changed again.
-- KEYS[1] the partition's items whose followers changed (sorted set): item -> the mark since
-- ARGV item, the mark it was read with, item, mark, ...
-- Returns how many were forgotten.
local settled = 0
for at = 1, #ARGV, 2 do
  if tonumber(redis.call('ZSCORE', KEYS[1], ARGV[at]) or '-1') == tonumber(ARGV[at + 1]) then
    settled = settled + redis.call('ZREM', KEYS[1], ARGV[at])
  end
end
return settled
