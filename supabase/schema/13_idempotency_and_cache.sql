-- Stored answers: finished answers that are sent again, for an Idempotency-Key or from the response cache.

create table public.stored_answers (
    id bigint generated always as identity primary key,
    kind text not null check (kind in ('idempotency', 'cache')),
    user_id bigint not null references public.users (id),
    place text not null check (place ~ '^[0-9a-f]{64}$'),
    fingerprint text not null check (fingerprint ~ '^[0-9a-f]{64}$'),
    request_id uuid not null,
    state text not null check (state in ('running', 'finished')),
    answer text check (length(answer) <= 2000000),
    created_at timestamptz not null default clock_timestamp(),
    expires_at timestamptz not null,
    constraint stored_answers_finished_has_answer check ((state = 'finished') = (answer is not null))
);
-- Answers are encrypted: there is nothing to compress.
alter table public.stored_answers alter column answer set storage external;
comment on table public.stored_answers is
    'Encrypted answers by place: SHA-256 of environment, path and key (idempotency) or of environment, path '
    'and canonical body (cache).';
comment on column public.stored_answers.answer is
    'Empty for a finished request that was charged and whose answer was not kept: the same key is refused, '
    'as a second run would be charged again.';
comment on column public.stored_answers.fingerprint is
    'Of an idempotency key: SHA-256 of the raw body. Of the cache: which encryption key sealed the answer.';
create unique index stored_answers_place_key on public.stored_answers (user_id, kind, place);
comment on index public.stored_answers_place_key is 'Of two requests with one key, one runs.';
create index stored_answers_request_idx on public.stored_answers (request_id);
create index stored_answers_expiry_idx on public.stored_answers (expires_at);
alter table public.stored_answers enable row level security;
revoke all on public.stored_answers from public, anon, authenticated, service_role;
grant select, insert, update, delete on public.stored_answers to service_role;
revoke all on sequence public.stored_answers_id_seq from public, anon, authenticated, service_role;
grant usage, select on sequence public.stored_answers_id_seq to service_role;

-- Idempotency
-- -----------

-- What this idempotency key has been used for, or null where it is free. A replay is not an admitted request:
-- it is neither recorded nor charged, and no limit stands in its way, because its answer has been paid for.
-- Outcomes: replayed, idempotency_running (with `expired` where its instance seems to be gone),
-- idempotency_conflict (another body), idempotency_not_kept (charged, but its answer was not kept).
create function public.check_idempotency(
    p_item public.admission_item, p_key public.api_keys_new, p_now timestamptz
) returns jsonb language plpgsql as $$
declare
    v_row public.stored_answers;
    v_record public.usage_records;
    v_base jsonb;
begin
    select * into v_row from public.stored_answers
    where user_id = p_key.user_id and kind = 'idempotency' and place = p_item.idempotency ->> 'place';
    if not found or (v_row.state = 'finished' and v_row.expires_at <= p_now) then
        return null;
    end if;
    select * into v_record from public.usage_records where request_id = v_row.request_id;
    if v_row.state = 'running' and v_record.status is distinct from 'pending' then
        return null;
    end if;
    v_base := jsonb_build_object(
        'user_id', p_key.user_id, 'key_id', p_key.id, 'environment', v_record.environment,
        'original_request_id', v_row.request_id, 'status', v_record.status, 'cost_nanos', v_record.cost_nanos,
        'balance_after_nanos', v_record.balance_after_nanos);
    if v_row.fingerprint <> p_item.idempotency ->> 'fingerprint' then
        return v_base || jsonb_build_object('outcome', 'idempotency_conflict');
    elsif v_row.state = 'running' then
        return v_base || jsonb_build_object(
            'outcome', 'idempotency_running',
            'retry_after',
            least(30, greatest(1, ceil(extract(epoch from p_now - v_record.created_at) / 2)))::int,
            'expired',
            case when v_record.expires_at <= p_now then jsonb_build_array(public.hold_json(v_record)) end);
    elsif v_row.answer = '' then
        return v_base || jsonb_build_object('outcome', 'idempotency_not_kept');
    end if;
    return v_base || jsonb_build_object(
        'outcome', 'replayed', 'answer', v_row.answer,
        'age', floor(extract(epoch from p_now - v_row.created_at))::bigint,
        'tokens', coalesce(v_record.prompt_tokens, 0) + coalesce(v_record.completion_tokens, 0));
end $$;
revoke all on function public.check_idempotency(public.admission_item, public.api_keys_new, timestamptz)
    from public, anon, authenticated;
grant execute on function public.check_idempotency(public.admission_item, public.api_keys_new, timestamptz)
    to service_role;

-- The key now belongs to this request: running or, with an answer from the cache, finished.
create function public.claim_idempotency(
    p_item public.admission_item, p_user_id bigint, p_answer text, p_now timestamptz
) returns void language plpgsql as $$
begin
    insert into public.stored_answers as a (
        kind, user_id, place, fingerprint, request_id, state, answer, created_at, expires_at)
    values ('idempotency', p_user_id, p_item.idempotency ->> 'place', p_item.idempotency ->> 'fingerprint',
            p_item.request_id, case when p_answer is null then 'running' else 'finished' end, p_answer, p_now,
            p_now + make_interval(
                secs => greatest((p_item.idempotency ->> 'ttl_seconds')::int, p_item.ttl_seconds)))
    on conflict (user_id, kind, place) do update set
        fingerprint = excluded.fingerprint, request_id = excluded.request_id, state = excluded.state,
        answer = excluded.answer, created_at = excluded.created_at, expires_at = excluded.expires_at;
end $$;
revoke all on function public.claim_idempotency(public.admission_item, bigint, text, timestamptz)
    from public, anon, authenticated;
grant execute on function public.claim_idempotency(public.admission_item, bigint, text, timestamptz)
    to service_role;

-- The request that had the key has ended. Its answer is kept; without an answer the key is free again, unless
-- somebody paid for the request.
create function public.finish_idempotency(p_request_id uuid, p_answer text, p_paid boolean) returns void
language plpgsql as $$
begin
    if p_answer is null and not p_paid then
        delete from public.stored_answers where request_id = p_request_id and kind = 'idempotency';
    else
        update public.stored_answers set state = 'finished', answer = coalesce(p_answer, '')
        where request_id = p_request_id and kind = 'idempotency' and state = 'running';
    end if;
end $$;
revoke all on function public.finish_idempotency(uuid, text, boolean) from public, anon, authenticated;
grant execute on function public.finish_idempotency(uuid, text, boolean) to service_role;

-- Response cache
-- --------------

-- The cached answer at this place, sealed by an encryption key that the instance still seals with. `clear`
-- deletes it instead.
create function public.find_cached(
    p_cache jsonb, p_user_id bigint, p_now timestamptz
) returns public.stored_answers language plpgsql as $$
declare
    v_row public.stored_answers;
begin
    if (p_cache ->> 'clear')::boolean then
        delete from public.stored_answers
        where user_id = p_user_id and kind = 'cache' and place = p_cache ->> 'place';
    else
        select * into v_row from public.stored_answers
        where user_id = p_user_id and kind = 'cache' and place = p_cache ->> 'place'
          and fingerprint = p_cache ->> 'fingerprint' and expires_at > p_now;
    end if;
    return v_row;
end $$;
revoke all on function public.find_cached(jsonb, bigint, timestamptz) from public, anon, authenticated;
grant execute on function public.find_cached(jsonb, bigint, timestamptz) to service_role;

-- Replaces what was at this place, whichever key it was sealed with.
create function public.keep_in_cache(
    p_cache jsonb, p_record public.usage_records, p_answer text, p_now timestamptz
) returns void language plpgsql as $$
begin
    -- The user is locked, so the account cannot be deleted meanwhile.
    insert into public.stored_answers (
        kind, user_id, place, fingerprint, request_id, state, answer, created_at, expires_at)
    select 'cache', u.id, p_cache ->> 'place', p_cache ->> 'fingerprint', p_record.request_id, 'finished',
           p_answer, p_now, p_now + make_interval(secs => (p_cache ->> 'ttl_seconds')::int)
    from public.users u where u.id = p_record.user_id and u.deleted_at is null
    on conflict (user_id, kind, place) do update set
        fingerprint = excluded.fingerprint, request_id = excluded.request_id, answer = excluded.answer,
        created_at = excluded.created_at, expires_at = excluded.expires_at;
end $$;
revoke all on function public.keep_in_cache(jsonb, public.usage_records, text, timestamptz)
    from public, anon, authenticated;
grant execute on function public.keep_in_cache(jsonb, public.usage_records, text, timestamptz)
    to service_role;

create function public.cached_json(p_row public.stored_answers, p_now timestamptz) returns jsonb
language plpgsql immutable as $$
begin
    return jsonb_build_object(
        'outcome', 'cached', 'answer', p_row.answer, 'original_request_id', p_row.request_id,
        'age', floor(extract(epoch from p_now - p_row.created_at))::bigint);
end $$;
revoke all on function public.cached_json(public.stored_answers, timestamptz)
    from public, anon, authenticated;
grant execute on function public.cached_json(public.stored_answers, timestamptz) to service_role;

-- Expiry
-- ------

-- Deletes at most a thousand expired answers and returns how many. It waits for nobody: a row that admission
-- is working on is not expired any more when admission is done.
create function public.delete_expired_answers() returns int language plpgsql set search_path = '' as $$
declare
    v_count int;
begin
    with expired as (
        select a.id from public.stored_answers a
        where a.expires_at <= clock_timestamp() and (a.state = 'finished' or not exists (
            select from public.usage_records r where r.request_id = a.request_id and r.status = 'pending'))
        order by a.expires_at limit 1000 for update skip locked
    )
    delete from public.stored_answers a using expired e where a.id = e.id;
    get diagnostics v_count = row_count;
    return v_count;
end $$;
revoke all on function public.delete_expired_answers() from public, anon, authenticated;
grant execute on function public.delete_expired_answers() to service_role;
