-- Drop a user's oldest waiting chunks, which the lake has, and mark the hole: all of it or nothing.
-- KEYS[1] the user's chunks (hash)    ARGV[1] the mark's field    ARGV[2] the first chunk that stays
-- ARGV[3] a later chunk that was there when this was decided      ARGV[4] how its records begin
-- Returns how many chunks left. None do where that chunk is not the one it was: Redis went back,
-- the user was forgotten and is numbered anew, or the generation was dropped.
local witness = redis.call('HGET', KEYS[1], ARGV[3])
if not witness or string.sub(witness, 1, #ARGV[4]) ~= ARGV[4] then
  return 0
end
local first = tonumber(redis.call('HGET', KEYS[1], ARGV[1]) or '0')
local dropped = 0
-- Deleting comes first: a full Redis lets a script go on that has begun to.
for number = first, tonumber(ARGV[2]) - 1 do
  dropped = dropped + redis.call('HDEL', KEYS[1], number)
end
if dropped > 0 then
  redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
end
return dropped
