-- The audit log: who did what to whom. Refusals are counted, one row a minute, so that nobody can fill the
-- log.

-- Table
-- -----

create table public.audit_logs (
    id bigint generated always as identity primary key,
    actor text not null,
    action text not null,
    target text,
    user_id bigint references public.users (id),
    key_id bigint references public.api_keys_new (id),
    ip inet,
    user_agent text check (length(user_agent) <= 512),
    request_id uuid,
    details jsonb not null default '{}' check (jsonb_typeof(details) = 'object'),
    -- Set for refusals only: the same refusal of the same subject within a minute is one row with a count.
    refusal_minute timestamptz,
    occurrences bigint not null default 1 check (occurrences > 0),
    created_at timestamptz not null default clock_timestamp()
);
create unique index audit_logs_refusal_key on public.audit_logs (actor, action, refusal_minute)
    where refusal_minute is not null;
create index audit_logs_user_idx on public.audit_logs (user_id, id desc);
create index audit_logs_key_idx on public.audit_logs (key_id, id desc);
alter table public.audit_logs enable row level security;
revoke all on public.audit_logs from public, anon, authenticated, service_role;
grant select, insert, update on public.audit_logs to service_role;
revoke all on sequence public.audit_logs_id_seq from public, anon, authenticated, service_role;
grant usage, select on sequence public.audit_logs_id_seq to service_role;

-- Only the count of a repeated refusal may grow.
create function public.refuse_audit_change() returns trigger language plpgsql set search_path = '' as $$
begin
    if old.refusal_minute is not null and new.occurrences > old.occurrences
       and to_jsonb(new) - 'occurrences' = to_jsonb(old) - 'occurrences' then
        return new;
    end if;
    raise exception 'audit_logs is append-only: update is refused' using errcode = 'restrict_violation';
end $$;
revoke all on function public.refuse_audit_change() from public, anon, authenticated;
grant execute on function public.refuse_audit_change() to service_role;

create trigger audit_logs_append_only before update on public.audit_logs
    for each row execute function public.refuse_audit_change();

create trigger audit_logs_never_deleted before delete on public.audit_logs
    for each row execute function public.refuse_change();

create trigger audit_logs_no_truncate before truncate on public.audit_logs
    for each statement execute function public.refuse_change();

-- Writing
-- -------

-- Every action of a person or a key goes through here, but refusals: those go through note_refusals.
create function public.write_audit(
    p_actor text, p_action text, p_target text, p_user_id bigint, p_key_id bigint, p_address text,
    p_user_agent text, p_request_id uuid, p_details jsonb
) returns void language sql set search_path = '' as $$
    insert into public.audit_logs (
        actor, action, target, user_id, key_id, ip, user_agent, request_id, details)
    values (p_actor, p_action, p_target, p_user_id, p_key_id, p_address::inet, left(p_user_agent, 512),
            p_request_id, coalesce(p_details, '{}'))
$$;
revoke all on function public.write_audit(text, text, text, bigint, bigint, text, text, uuid, jsonb)
    from public, anon, authenticated;
grant execute on function public.write_audit(text, text, text, bigint, bigint, text, text, uuid, jsonb)
    to service_role;

-- An action of a user on their own settings. Of a URL only the origin is written: path and query are often
-- secret, and the log is kept for ever.
create function public.audit_order(
    p jsonb, p_action text, p_target text, p_user_id bigint, p_details jsonb
) returns void language sql set search_path = '' as $$
    select public.write_audit(
        p ->> 'actor', p_action, p_target, p_user_id, (p ->> 'maker_id')::bigint, p ->> 'address',
        p ->> 'user_agent', (p ->> 'request_id')::uuid,
        case when p_details ? 'url'
             then jsonb_set(p_details, '{url}',
                            to_jsonb(substring(p_details ->> 'url' from '^https://[^/?#]*')))
             else p_details end)
$$;
revoke all on function public.audit_order(jsonb, text, text, bigint, jsonb) from public, anon, authenticated;
grant execute on function public.audit_order(jsonb, text, text, bigint, jsonb) to service_role;

-- Writes the notes that refusal() made, all of a batch at once and in one order: two batches that took the
-- same rows in opposite orders would deadlock.
create function public.note_refusals(p_notes jsonb[]) returns void language sql set search_path = '' as $$
    insert into public.audit_logs as a (
        actor, action, target, user_id, key_id, ip, user_agent, request_id, refusal_minute, occurrences)
    select n.actor, n.action, 'api', (array_agg(n.user_id))[1], (array_agg(n.key_id))[1],
           (array_agg(n.ip))[1], (array_agg(n.user_agent))[1], (array_agg(n.request_id))[1],
           date_trunc('minute', clock_timestamp()), count(*)
    from unnest(p_notes) as j,
         jsonb_to_record(j) as n (actor text, action text, user_id bigint, key_id bigint, ip inet,
                                  user_agent text, request_id uuid)
    group by n.actor, n.action
    order by n.actor collate "C", n.action collate "C"
    on conflict (actor, action, refusal_minute) where refusal_minute is not null
    do update set occurrences = a.occurrences + excluded.occurrences
$$;
revoke all on function public.note_refusals(jsonb[]) from public, anon, authenticated;
grant execute on function public.note_refusals(jsonb[]) to service_role;

-- Counts a wrong administrator's secret: one audit row a minute and address, and at most `limit` answers a
-- minute.
-- p: action, address, address_subject, user_agent, request_id, limit. Outcomes: counted, limited (with
-- retry_after).
create function public.note_wrong_secret(p jsonb) returns jsonb language plpgsql set search_path = '' as $$
declare
    v_id bigint := hashtextextended('secret:' || (p ->> 'address_subject'), 0);
    v_now timestamptz := clock_timestamp();
    v_ring bigint[];
begin
    perform public.note_refusals(array[jsonb_build_object(
        'actor', 'address:' || (p ->> 'address_subject'), 'action', p ->> 'action', 'ip', p ->> 'address',
        'user_agent', left(p ->> 'user_agent', 512), 'request_id', p ->> 'request_id')]);
    insert into public.rate_limit_usage (subject, subject_id) values ('address', v_id) on conflict do nothing;
    select public.advance_ring(
        u.minute_ring, 7, (extract(epoch from v_now) * 1000)::bigint / 10000) into v_ring
    from public.rate_limit_usage u where u.subject = 'address' and u.subject_id = v_id for no key update;
    if v_ring[15] >= (p ->> 'limit')::bigint then
        return jsonb_build_object('outcome', 'limited', 'retry_after', public.retry_after_seconds(
            public.ring_frees_at(v_ring, 7, 10000, 0, v_ring[15] + 1 - (p ->> 'limit')::bigint), v_now));
    end if;
    update public.rate_limit_usage u set minute_ring = public.count_in_ring(v_ring, 7, null, 1, 0),
        last_used_at = v_now
    where u.subject = 'address' and u.subject_id = v_id;
    return jsonb_build_object('outcome', 'counted');
end $$;
comment on function public.note_wrong_secret is
    'Of an address''s guesses; whether a right secret is let in is never asked here, so that nobody can '
    'lock the operator out.';
revoke all on function public.note_wrong_secret(jsonb) from public, anon, authenticated;
grant execute on function public.note_wrong_secret(jsonb) to service_role;

-- Reading
-- -------

-- A page of a user's own audit log, newest first. An administrator's action on the account is shown, without
-- the address it came from.
create function public.list_own_audit(
    p_user_id bigint, p_key_id bigint, p_action text, p_start timestamptz, p_end timestamptz, p_before bigint,
    p_limit int
) returns jsonb language sql stable set search_path = '' as $$
    select coalesce(jsonb_agg(to_jsonb(l) order by l.id desc), '[]') from (
        select a.id, case when o.own then a.actor else 'admin' end as actor, a.action, a.target, a.user_id,
               a.key_id, case when o.own then host(a.ip) end as ip,
               case when o.own then a.user_agent end as user_agent, a.request_id, a.details, a.occurrences,
               a.created_at
        from public.audit_logs a, lateral (
            select a.actor in ('gateway', 'user:' || p_user_id) or exists (
                select from public.api_keys_new k
                where k.user_id = p_user_id and a.actor = 'key:' || k.id) as own) as o
        where a.user_id = p_user_id and (p_key_id is null or a.key_id = p_key_id)
          and (p_action is null or a.action = p_action)
          and (p_start is null or a.created_at >= p_start) and (p_end is null or a.created_at < p_end)
          and (p_before is null or a.id < p_before)
        order by a.id desc limit p_limit) as l
$$;
revoke all on function public.list_own_audit(bigint, bigint, text, timestamptz, timestamptz, bigint, int)
    from public, anon, authenticated;
grant execute on function public.list_own_audit(bigint, bigint, text, timestamptz, timestamptz, bigint, int)
    to service_role;
